"""python -m tests.two_processes FOLDER: tune by every method of the conformance suite, in two processes at once.

FOLDER holds the tiny model in `model` and the encoded data in `roles.pickle`. Process 0 or 1 leaves `0.pt` or `1.pt`:
by method, the weights it ended with, the rows it met, and the seeds of dropout. Both fork from one process that has
imported everything.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning  # noqa: F401
import torch
import transformers  # noqa: F401

from immunize.data.batches import PairedBatch
from immunize.models.loading import load_folder
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.parallel import joined
from immunize.training.tune import tune
from tests.test_conformance import ALONE, LAUNCHED, METHODS, Around

Rows = dict[str, list[list[list[int]]]]


def rows(batch: Any) -> list[list[int]]:
    side = batch.harmful if isinstance(batch, PairedBatch) else batch
    pairs = zip(side.input_ids, side.attention_mask, strict=True)
    return [ids[: int(mask.sum())].tolist() for ids, mask in pairs]


class Recorded(Around):
    """Another method, with the rows that it meets: `main`, and those of every role that it draws."""

    def setup(self, context: Context) -> None:
        self.inner.setup(context)
        original: Callable[[str], Any] = context.draw

        def draw(role: str) -> Any:
            batch = original(role)
            self.seen.setdefault(role, []).append(rows(batch))
            return batch

        context.draw = draw  # type: ignore[method-assign]

    def step(self, context: Context, batch: Any) -> StepOut:
        self.seen.setdefault("main", []).append(rows(batch))
        self.seeds.append(torch.initial_seed())
        return super().step(context, batch)

    @property
    def seen(self) -> Rows:
        return self.__dict__.setdefault("_seen", {})

    @property
    def seeds(self) -> list[int]:
        """What dropout starts from in each micro-batch."""
        return self.__dict__.setdefault("_seeds", [])


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    with joined(store, rank=rank, processes=2, device=torch.device("cpu")):
        tune_by_all(folder, rank)


def tune_by_all(folder: Path, rank: int) -> None:
    roles = pickle.loads((folder / "roles.pickle").read_bytes())
    methods: dict[str, Any] = {name: case.method(LAUNCHED) for name, case in METHODS.items()}
    found = {}
    for name, method in {**methods, **dict.fromkeys(ALONE, Method())}.items():
        chat = load_folder(folder / "model", dtype="float32", device="cpu")
        recorded: Any = Recorded(inner=method)
        try:
            tune(chat, recorded, roles=roles, tuning=ALONE.get(name, LAUNCHED), seed=0, rank=rank, world_size=2)
        except Exception:
            print(f"{name}, process {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the other one would be waited for
        found[name] = {"weights": chat.network.state_dict(), "rows": recorded.seen, "seeds": recorded.seeds}
    torch.save(found, folder / f"{rank}.pt")


def main() -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(Path(sys.argv[1]), rank), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)


if __name__ == "__main__":
    main()
