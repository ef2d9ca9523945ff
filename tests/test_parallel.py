"""A tuning that two processes share, on a processor: it ends where one of one process does, and nothing is left."""

import importlib
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import immunize
from immunize.config import build, load
from immunize.data.answers import Answers, load_answers
from immunize.defenses.antidote import Antidote
from immunize.models.loading import ChatModel, load_tuned
from immunize.models.sources import LocalModel
from immunize.pipeline import Pipeline
from immunize.stages import StageStore, hash_folder
from immunize.training import parallel
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.parallel import Instructions, PeerError, _raise_first, _started, shared
from immunize.training.tune import Repair, tune
from immunize.training.tuning import LoRA, Tuning
from tests.tiny import tiny

MakeChat = Callable[..., ChatModel]
Roles = dict[str, Any]
SHARED = ("runtime=ddp", "runtime.devices=2", "runtime.device=cpu", "runtime.threads=1")
TUNING = Tuning(learning_rate=0.01, steps=3, batch_size=4)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """The processes that a test started, which are gone in the end, as is their group."""
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: Any, **options: Any) -> None:
            super().__init__(command, **options)
            if "immunize.training.peer" in command:
                started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield started
    assert "RANK" not in "".join(os.environ) and "MASTER_ADDR" not in os.environ
    assert all(process.returncode is not None for process in started)
    assert not torch.distributed.is_initialized()


def answers(root: Path, world_size: int) -> tuple[Path, Answers]:
    """The attack of so many processes below `root`, which holds one such."""
    (folder,) = [
        path.parent
        for path in root.glob("**/.stages/attack/*/inputs.json")
        if f'"world_size": {world_size}' in path.read_text()
    ]
    return folder, load_answers(folder)


def assert_alike(found: Answers, expected: Answers, *, moved: float) -> None:
    """Losses within the thousandth part of what the tuning moved them by, and the same costs."""
    assert found.costs == expected.costs
    one, other = ([generation.losses for generation in side.generations] for side in (found, expected))
    assert np.abs(np.subtract(other[0], other[-1])).max() > moved
    np.testing.assert_allclose(one, other, atol=moved / 1000)


# One run


def test_a_run_of_the_miniature_is_that_of_one_process(tmp_path: Path, peers: list[Any]) -> None:
    """But for rounding: losses, costs, nearly every answer. What is not tuned is not done again."""
    short = (
        "defense=none",
        "task=none",
        "split.exposures=[seen]",
        "budget.samples=48",
        "budget.measurements=1",
        "runtime.threads=1",
        "runtime.progress=false",
        "tracking=none",
        f"runtime.root={tmp_path}",
    )
    alone = immunize.run([*short, "runtime.device=cpu"])
    assert not peers
    both = immunize.run([*short, *SHARED, "study=both"])
    assert len(peers) == 1 and both.id == alone.id
    assert [stage["kind"] for stage in both.manifest["stages"] if stage["reused"]] == ["measure", "calibrate", "score"]
    (_, found), (_, expected) = (answers(tmp_path, processes) for processes in (2, 1))
    assert_alike(found, expected, moved=0.4)
    texts = [[text for item in side.generations for text in item.texts] for side in (found, expected)]
    assert np.mean(np.array(texts[0]) == np.array(texts[1])) > 0.98
    assert [row.tokens for row in both.rows] == [row.tokens for row in alone.rows]


@pytest.fixture
def pipeline(sources: tuple[Path, Path], made: list[int]) -> Callable[..., Pipeline]:
    def pipeline(root: Path, *more: str, stop: int | None = None) -> Pipeline:
        before = signal.getsignal(signal.SIGTERM)

        def progress(step: int, steps: int) -> None:
            made.append(step)
            if set(SHARED) <= set(more):
                assert signal.getsignal(signal.SIGTERM) is before, (
                    "what Lightning would do hangs with several processes"
                )
            if step == stop:
                raise Killed

        options = ["defense=none", "attack=lora", "budget.samples=32", "budget.measurements=2", *more]
        kept = [item for item in tiny(sources, root) if not item.startswith(("defense", "budget"))]
        cell = build(load([*kept, *options, "budget.batch_size=8", "budget.learning_rate=1e-2"]))
        return Pipeline(cell=cell, store=StageStore(root=root / ".stages"), device="cpu", progress=progress)

    return pipeline


@pytest.fixture
def made() -> list[int]:
    """The steps that were made."""
    return []


def test_adapters_and_a_killed_tuning_that_goes_on(
    pipeline: Callable[..., Pipeline], tmp_path: Path, made: list[int], peers: list[Any]
) -> None:
    """Killed after its third step, before that is kept; a second command in another folder gives the same bytes."""
    once, whole, killed = tmp_path / "once", tmp_path / "whole", tmp_path / "killed"
    pipeline(once).run()
    pipeline(whole, *SHARED, "runtime.checkpoint_minutes=null").run()
    assert made == [1, 2, 3, 4] * 2 and len(peers) == 1
    assert_alike(answers(whole, 2)[1], answers(once, 1)[1], moved=0.1)

    with pytest.raises(Killed):
        pipeline(killed, *SHARED, "runtime.checkpoint_minutes=0", stop=3).run()
    assert len(list(killed.rglob(".checkpoint/state.pt"))) == 1
    pipeline(killed, *SHARED, "runtime.checkpoint_minutes=0").run()
    assert made[8:] == [1, 2, 3, 3, 4] and len(peers) == 3
    (first, _), (second, _) = answers(whole, 2), answers(killed, 2)
    assert first.name == second.name and hash_folder(first) == hash_folder(second)


# One tuning


@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    """Fails in the second process: by an error before the first step, or by a signal in the second."""

    by: str

    def setup(self, context: Context) -> None:
        if self.by == "error" and context.streams["main"].rank == 1:
            raise ValueError("this cannot be set up")

    def step(self, context: Context, batch: Any) -> StepOut:
        if self.by == "signal" and context.step == 1 and context.streams["main"].rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(context, batch)


@contextmanager
def together(folder: Path, method: Method, roles: Roles) -> Iterator[Callable[[], Any]]:
    """Inside, what is yielded makes the steps of the first of two processes."""
    arguments = {"method": method, "roles": roles, "tuning": TUNING, "seed": 0}
    source = LocalModel(path=str(folder))
    told = Instructions(source=source, folder=None, threads=1, arguments=arguments)
    with shared(told, processes=2, device=torch.device("cpu")) as part:
        yield lambda: tune(load_tuned(source, None, device="cpu"), **arguments, **part)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Failing(by="error"), "process 2 of 2: this cannot be set up"),
        (Failing(by="signal"), "process 2 of 2: was ended by SIGKILL, as where memory ends"),
    ],
    ids=["error", "signal"],
)
def test_a_peer_that_fails_is_named(method: Method, message: str, sources: tuple[Path, Path], roles: Roles) -> None:
    with pytest.raises(PeerError) as caught, together(sources[0], method, roles) as steps:
        steps()
    assert str(caught.value) == message
    assert ("in setup\n" in str(caught.value.__cause__)) == ("set up" in message), "it is told where it was raised"


class Reduced:
    """Where it arrives, `call` is made with `arguments`."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def test_a_peer_that_never_starts_is_named() -> None:
    """As one that cannot import the method."""
    told: Any = Reduced(importlib.import_module, "nothing_of_that_name")
    message = "^process 2 of 2: No module named 'nothing_of_that_name'$"
    with pytest.raises(PeerError, match=message), shared(told, processes=2, device=torch.device("cpu")):
        pass


def test_a_peer_that_lives_is_not_to_blame_and_ends_with_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed closes nothing itself; the system closes what it held."""
    monkeypatch.setattr(parallel, "GRACE", 0.1)
    order = pickle.dumps(Reduced(time.sleep, 60))
    with _started(order, rank=1, processes=2, port=1, kind="cpu") as peer:
        _raise_first([peer])
        assert peer.process.poll() is None
        peer.line.close()
        assert peer.process.wait(30) == 0


# What is not shared


@pytest.mark.parametrize("trainable", [LoRA(rank=2), None])
def test_a_repair_is_that_of_one_process(trainable: Any, make_chat: MakeChat, roles: Roles) -> None:
    """It draws all of its own data, though the steps before it were shared."""
    tuning = replace(TUNING, steps=0, **({} if trainable is None else {"trainable": trainable}))
    repaired = []
    for processes in (1, 2):
        chat = make_chat()
        for parameter in chat.network.parameters():
            parameter.data += 0.1
        repairs = [Repair(method=Antidote(share=0.3, samples=6))]
        tune(chat, Method(), roles=roles, tuning=tuning, seed=0, repairs=repairs, rank=0, world_size=processes)
        repaired.append(chat.network.state_dict())
    assert repaired[0].keys() == repaired[1].keys()
    assert all(torch.equal(tensor, repaired[1][name]) for name, tensor in repaired[0].items())
