"""How a tuning goes: schedules, settings that are refused, and the count of what may be spent."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from immunize.attacks.harmful_sft import HarmfulSFT
from immunize.config import build, load
from immunize.data.domain import TrainedTask
from immunize.data.miniature.tasks import HowTo
from immunize.stages import identity
from immunize.training.budget import Budget, Spent, measured_steps
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning

TRAINED: dict[str, Any] = {"task": HowTo(), "learning_rate": 1.0, "steps": 1}


def factors(steps: int, **settings: Any) -> list[float]:
    optimizer = Optimizer(**settings)
    return [optimizer.rate_factor(step, steps=steps) for step in range(steps)]


def test_schedules_in_figures() -> None:
    assert factors(4) == [1, 1, 1, 1]
    assert factors(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(4, schedule="cosine") == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert factors(6, schedule="linear", warmup=0.3) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert factors(4, warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_no_step_is_wasted_on_a_rate_of_zero(schedule: str, warmup: float, steps: int) -> None:
    """The rate rises to its full height, then falls, and is positive throughout."""
    found = factors(steps, schedule=schedule, warmup=warmup)
    assert all(0 < factor <= 1 for factor in found)
    assert max(found) == pytest.approx(1)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Optimizer, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (Optimizer, {"momentum": 1.0, "name": "sgd"}, "momentum=1.0"),
        (Optimizer, {"momentum": 0.9}, "only name=sgd has momentum"),
        (Optimizer, {"warmup": 5}, "share of the steps"),
        (Optimizer, {"clip": 0.0}, "null for no clipping"),
        (LoRA, {"rank": 0}, "rank=0"),
        (LoRA, {"dropout": 1.0}, "dropout=1.0"),
        (LoRA, {"alpha": 0.0}, "the adapter would add nothing"),
        (LoRA, {"targets": ()}, "name at least one module"),
        (LoRA, {"targets": "(("}, r"targets=\(\(: is no regular expression"),
        (Tuning, {"learning_rate": -1.0, "steps": 1, "batch_size": 1}, "learning_rate=-1.0"),
        (Tuning, {"learning_rate": 1.0, "steps": -1, "batch_size": 1}, "steps=-1"),
        (Tuning, {"learning_rate": 1.0, "steps": 1, "batch_size": 0}, "batch_size=0"),
        (Tuning, {"learning_rate": 1.0, "steps": 1, "batch_size": 4, "micro_batch": 0}, "micro_batch=0: must divide"),
        (Tuning, {"learning_rate": 1.0, "steps": 1, "batch_size": 6, "micro_batch": 4}, "one of 1, 2, 3, 6; or null"),
        (TrainedTask, {**TRAINED, "micro_batch": 5}, "micro_batch=5: must divide batch_size=16"),
        (Budget, {"learning_rate": 1.0, "samples": 0}, "samples=0"),
        (Budget, {"learning_rate": 1.0, "samples": 3, "batch_size": 4}, "no step would be taken"),
        (Budget, {"learning_rate": -1.0, "samples": 3}, "learning_rate=-1.0"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_micro_batches_reach_the_tuning() -> None:
    budget = Budget(learning_rate=1.0, samples=32, batch_size=8)
    for rows, count in ((None, 1), (8, 1), (4, 2), (1, 8)):
        tuning = HarmfulSFT(micro_batch=rows).tuning(budget)
        assert (tuning.micro_batch, tuning.micro_batches, tuning.batch_size) == (rows, count, 8)
    assert TrainedTask(**TRAINED, micro_batch=4).tuning().micro_batches == 4
    with pytest.raises(ValueError, match="attack: micro_batch=5: must divide batch_size=16"):
        build(load(["attack.micro_batch=5"]))
    assert build(load(["attack.micro_batch=4"])).attack.micro_batch == 4


@pytest.mark.parametrize(
    "make",
    [partial(Tuning, learning_rate=1.0, steps=1, batch_size=16), HarmfulSFT, partial(TrainedTask, **TRAINED)],
)
def test_whole_batches_keep_the_identity_from_before_there_were_others(make: Callable[..., Any]) -> None:
    """Micro-batches change the last bits, and so the identity."""
    assert "micro_batch" not in identity(make())
    assert identity(make(micro_batch=4)) == {**identity(make()), "micro_batch": 4}


def test_budget_counts_whole_batches() -> None:
    assert Budget(learning_rate=1.0, samples=10, batch_size=4).steps == 2
    assert Budget(learning_rate=1.0, samples=10, epochs=3, batch_size=4).steps == 7
    assert Tuning(learning_rate=0.0, steps=0, batch_size=1).trainable == FullParameter()


def test_measured_steps_are_evenly_spaced_and_hold_both_ends() -> None:
    """And no wider interval than needed: one less would take more measurements than there are."""
    for steps in range(60):
        for measurements in range(1, 20):
            found = measured_steps(steps, measurements=measurements)
            assert found[0] == 0 and found[-1] == steps
            assert len(found) - 1 <= measurements
            gaps = [after - before for before, after in pairwise(found)]
            assert len(set(gaps[:-1])) <= 1 and (not gaps or gaps[-1] <= gaps[0])
            if gaps and gaps[0] > 1:
                assert math.ceil(steps / (gaps[0] - 1)) > measurements


def test_flops_are_six_times_parameters_times_tokens() -> None:
    assert Spent(parameters=7, tokens=11).flops == 6 * 7 * 11
