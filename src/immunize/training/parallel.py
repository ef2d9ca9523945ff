"""Several processes that tune one model, each on a device of its own: this one, and peers that it starts for it.

The tuning is what is shared. This process is the first: it alone measures, repairs, shows progress, writes checkpoints
and goes on after the last step. A peer (`immunize.training.peer`) loads the same weights, makes the same steps on its
part of every batch, and is ended with the tuning. Peers are interpreters of their own: forks do not survive CUDA, and
those of `multiprocessing` would run a user's script a second time.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch import distributed

from immunize.models.sources import ModelSource

READY = "ready"
WAIT = timedelta(days=1)  # longer than any measurement, during which peers wait in the next step's exchange
GRACE = 2.0  # seconds in which a peer that is to blame for an error here has been heard of
HOST = "127.0.0.1"


class PeerError(RuntimeError):
    """A process that shared a tuning has failed; says which and why."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What a peer is told: where the weights lie (a model, or a folder of tuned ones), and the arguments of `tune`.

    Travels by pickle, so that the method's class must be one that can be imported.
    """

    source: ModelSource
    folder: Path | None
    threads: int
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a peer ended: `seconds` on the clock that all processes share, the error, and where it was raised."""

    seconds: float
    error: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer as the first process sees it. Over `line` it says that it is ready, or how it failed, and nothing else."""

    name: str
    process: "subprocess.Popen[bytes]"
    line: Connection
    said: IO[bytes]

    def hear(self) -> Failure | None:
        """What it has to say, once `line` has it: None when it is ready."""
        try:
            message = self.line.recv()
            return message if isinstance(message, Failure) else None
        except (EOFError, OSError):
            code = self.process.wait()
        if code < 0:
            error = f"was ended by {signal.Signals(-code).name}"
            return Failure(seconds=0.0, error=error + (", as where memory ends" if code == -signal.SIGKILL else ""))
        self.said.seek(0)
        words = self.said.read().decode(errors="replace").strip()
        return Failure(seconds=0.0, error=f"ended with code {code}, see what it said", traceback=words)


@contextmanager
def shared(instructions: Instructions, *, processes: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Start the peers of one tuning; inside, `tune` is to be called with what is yielded and makes the steps with them.

    Devices are this process's `device` and, on GPUs, those with the next numbers. Raises PeerError when a peer fails.
    However it is left, no peer is alive afterwards. With one process nothing is done.
    """
    if processes == 1:
        yield {}
        return
    store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=WAIT)
    order = pickle.dumps(instructions)
    with ExitStack() as stack:
        peers = [
            stack.enter_context(_started(order, rank=rank, processes=processes, port=store.port, kind=device.type))
            for rank in range(1, processes)
        ]
        _await(peers)
        with joined(store, rank=0, processes=processes, device=device), _guarded(peers):
            try:
                yield {"rank": 0, "world_size": processes}
                distributed.barrier()  # a peer has made its last step long before this process has measured it
            except Exception:  # it may come of a peer's end, which is then what there is to tell
                _raise_first(peers)
                raise


@contextmanager
def joined(store: Any, *, rank: int, processes: int, device: torch.device) -> Iterator[None]:
    """Inside, this process is one of those that share gradients; entered when all have come."""
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=processes,
        timeout=WAIT,
        device_id=device if on_gpu else None,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _started(order: bytes, *, rank: int, processes: int, port: int, kind: str) -> Iterator[Peer]:
    """A peer that can import what this process can; it does not outlive the block, nor this process."""
    ours, theirs = connection.Pipe()
    device = kind if kind == "cpu" else f"{kind}:{rank}"
    place = [theirs.fileno(), rank, processes, port, device]
    paths = dict.fromkeys(path or str(Path.cwd()) for path in sys.path)
    with closing(ours), tempfile.TemporaryFile() as said:
        with closing(theirs):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "immunize.training.peer", *map(str, place)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        try:
            with suppress(OSError):  # one that has ended already is heard of by `_await`
                ours.send_bytes(order)
            yield Peer(name=f"process {rank + 1} of {processes}", process=process, line=ours, said=said)
        finally:
            process.kill()
            process.wait()


def _await(peers: Sequence[Peer]) -> None:
    """Return when every peer has loaded its model."""
    loading = {peer.line: peer for peer in peers}
    while loading:
        for line in connection.wait(list(loading)):
            peer = loading.pop(line)  # type: ignore[call-overload]
            if (failure := peer.hear()) is not None:
                raise _error(peer, failure)


def _raise_first(peers: Sequence[Peer]) -> None:
    """Raise PeerError where a peer has ended; of several, the first draws the others after it."""
    lines = {peer.line: peer for peer in peers}
    heard = [(lines[line], lines[line].hear()) for line in connection.wait(list(lines), GRACE)]  # type: ignore[index]
    ended = [(peer, failure) for peer, failure in heard if failure is not None]
    if ended:
        raise _error(*min(ended, key=lambda item: item[1].seconds))


def _error(peer: Peer, failure: Failure) -> PeerError:
    error = PeerError(f"{peer.name}: {failure.error}")
    error.__cause__ = RuntimeError(f"in {peer.name}:\n{failure.traceback}") if failure.traceback else None
    return error


@contextmanager
def _guarded(peers: Sequence[Peer]) -> Iterator[None]:
    """Inside, this process does not wait for a peer that has ended: on a GPU nothing else would tell it."""
    stop, stopper = connection.Pipe()
    group = distributed.group.WORLD
    assert group is not None

    def watch() -> None:
        if stop not in connection.wait([stop, *(peer.line for peer in peers)]):
            group.abort()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopper.close()
        thread.join()
        stop.close()
