"""python -m immunize.training.peer LINE RANK PROCESSES PORT DEVICE: one of the processes that tune a model together.

Started by `immunize.training.parallel` alone, at whose end of LINE, a file descriptor, the instructions come.
"""

import os
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from threading import Event, Thread


def main() -> None:
    """Do as told and then wait; end as soon as the first process ends or says so by closing the line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first process hears of it, too, and its peers end with it
    descriptor, rank, processes, port = map(int, sys.argv[1:5])
    line = Connection(descriptor)
    order = line.recv_bytes()
    Thread(target=_end_with, args=(line,), daemon=True).start()
    from immunize.training.parallel import Failure

    try:
        _work(order, line, rank=rank, processes=processes, port=port, device=sys.argv[5])
    except BaseException as error:  # whatever it is, the first process is to know
        words = " ".join(str(error).split()) or type(error).__name__
        line.send(Failure(seconds=time.monotonic(), error=words, traceback=traceback.format_exc()))
        os._exit(1)  # no exchange with the others is to be ended properly
    Event().wait()


def _end_with(line: Connection) -> None:
    """Nothing more is said on the line: it ends."""
    try:
        line.poll(None)
    finally:
        os._exit(0)


def _work(order: bytes, line: Connection, *, rank: int, processes: int, port: int, device: str) -> None:
    import torch
    from torch import distributed

    from immunize.models.loading import load_tuned
    from immunize.training.parallel import HOST, READY, WAIT, Instructions, joined
    from immunize.training.tune import tune

    own = torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    instructions: Instructions = pickle.loads(order)
    torch.set_num_threads(instructions.threads)
    chat = load_tuned(instructions.source, instructions.folder, device=device)
    store = distributed.TCPStore(HOST, port, is_master=False, timeout=WAIT)
    line.send(READY)
    with joined(store, rank=rank, processes=processes, device=own):
        tune(chat, rank=rank, world_size=processes, **instructions.arguments)
        distributed.barrier()


if __name__ == "__main__":
    main()
