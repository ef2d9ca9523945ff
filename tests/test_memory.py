"""When memory does not suffice, the reason names the stage, the sizes and what to lower; nothing else is lost."""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import immunize
from immunize import records
from immunize.config import build, load
from immunize.judges.weights import Weights
from immunize.progress import Progress
from immunize.records import RunFailedError
from immunize.training.context import Context
from immunize.training.memory import OutOfMemoryError, Sizes, explained
from immunize.training.method import Method, StepOut
from immunize.training.tuning import Tuning
from immunize.worker import work
from tests.test_rejudge import command
from tests.tiny import tiny

# By hand: two tables of 320 tokens, three layers of 32 x (32 + 16 + 16 + 32 + 3 x 64) + 2 norms, and a norm; hidden 32.
PARAMETERS = 2 * 320 * 32 + 3 * (32 * (32 + 16 + 16 + 32 + 3 * 64) + 2 * 32) + 32
LIVING: list[Any] = []


def on_a_gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def on_a_processor() -> Exception:
    """What torch itself says when no memory is as large."""
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte was there")


@pytest.fixture
def cells(sources: tuple[Path, Path], tmp_path: Path) -> list[Any]:
    """The tiny run, twice: with a defense, and with none."""
    options = tiny(sources, tmp_path)
    none = [option for option in options if not option.startswith("defense.")]
    return [build(load(options)), build(load([*none, "defense=none"]))]


@pytest.mark.parametrize("make_error", [on_a_gpu, on_a_processor, MemoryError])
def test_out_of_memory_is_told_and_the_study_goes_on(
    make_error: Callable[[], Exception], cells: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step of the attack on the defended arm asks for too much; the other run is finished."""
    original = Method.step
    steps, LIVING[:] = {"count": 0}, []

    def step(self: Method, context: Context, batch: Any) -> StepOut:
        steps["count"] += 1
        if steps["count"] == 4:
            LIVING.append(weakref.ref(context.chat.network))
            raise make_error()
        return original(self, context, batch)

    with monkeypatch.context() as patched, Progress(enabled=False) as progress:
        patched.setattr(Method, "step", step)
        tally = work(cells, progress=progress)
    assert len(tally.ran) == 1 and set(tally.failed) == {cells[0].run_id}
    reason = tally.failed[cells[0].run_id]
    for part in (
        "failed at [defended: attack seen]",
        "out of memory in [defended: attack seen]: tiny in float32, ",
        f" {PARAMETERS:,} parameters",
        "FullParameter tuning, batch_size=8, of which 8 rows at once, up to",
        "to lower: micro_batch (or batch_size), runtime.gradient_checkpointing=true, a trainable set of LoRA, "
        "model.generation_batch, model.dtype=bfloat16",
    ):
        assert part in reason, reason
    assert LIVING[0]() is None, "what filled the memory is let go of"
    assert not list(cells[0].root.rglob(".*.making"))
    with Progress(enabled=False) as progress:
        again = work(cells, progress=progress)
    assert again.failed == {} and again.stages["reused"] > 0
    assert all(records.is_finished(cell.folder) for cell in cells)


@dataclass(frozen=True, kw_only=True)
class Source:
    name: ClassVar[str] = "model"
    dtype: str = "bfloat16"
    generation_batch: int = 8
    unused: dict[str, Any] = field(default_factory=dict)


def test_the_rows_at_once_are_those_of_one_process() -> None:
    tuning = Tuning(learning_rate=0.1, steps=1, batch_size=8)
    for processes, micro_batch, rows in ((1, None, 8), (2, None, 4), (2, 2, 2)):
        asked: Any = replace(tuning, micro_batch=micro_batch)
        sizes = Sizes(stage="s", source=Source(), tuning=asked, processes=processes)  # type: ignore[arg-type]
        assert f"batch_size=8, of which {rows} rows at once" in sizes.sentence()


def test_a_judge_that_is_too_large_is_told_in_a_run_and_when_asked_later(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = sources
    place = [f"judge.guard.model.path={model}", "judge.guard.model.commit=null", "judge.guard.batch_size=3"]
    done = immunize.run(tiny(sources, tmp_path))

    def load_too_much(*_: Any, **__: Any) -> Any:
        raise on_a_gpu()

    monkeypatch.setattr(Weights, "load", load_too_much)
    told = r"out of memory in \[{}\]: guard, batch_size=3; to lower: batch_size of judge guard \(or its model.dtype\)"
    with pytest.raises(RunFailedError, match=told.format("control: score seen")):
        immunize.run([*tiny(sources, tmp_path), "judge=guard", *place])
    assert command(done.path.parent, "judge=guard", *place, "--source", f"{data.name}={data}") == 2
    assert re.search(told.format(f"run {done.id}"), capsys.readouterr().err)


def test_other_errors_pass_unchanged_and_answers_have_advice_of_their_own() -> None:
    sizes: Any = Sizes(stage="control: measure", source=Source())  # type: ignore[arg-type]
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory")):
        with pytest.raises(type(error)) as caught, explained(sizes):
            raise error
        assert caught.value is error
    with pytest.raises(OutOfMemoryError) as told, explained(sizes):
        raise MemoryError
    assert str(told.value) == (
        "out of memory in [control: measure]: model in bfloat16, generation_batch=8; to lower: model.generation_batch"
    )
