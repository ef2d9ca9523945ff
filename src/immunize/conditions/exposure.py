"""What every check on one exposure under one judge starts from, and the gate they share."""

from collections.abc import Sequence
from dataclasses import dataclass

from immunize.conditions.crossing import first_step
from immunize.conditions.curves import paired_curves
from immunize.conditions.guard import guard_of
from immunize.conditions.harm import ExcessHarm, excess_harm
from immunize.conditions.selection import WorstStep, worst_step
from immunize.conditions.settings import Conditions
from immunize.stats import mean
from immunize.types import Arm, EvaluationSet, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """One exposure under one judge.

    `harm_if_broken` is `harm` with broken answers counted as 1. `gate` asks whether the attack broke the control.
    Steps are those to the threshold, the last step where it was never crossed; `censored` names those arms.
    """

    evaluation_set: EvaluationSet
    judge: str
    settings: Conditions
    harm: ExcessHarm
    harm_if_broken: ExcessHarm
    gate: WorstStep
    steps_control: int
    steps_defended: int
    censored: tuple[Arm, ...]
    flags: tuple[str, ...]


def exposure_of(
    scores: Sequence[Score],
    sets: Sequence[EvaluationSet],
    *,
    evaluation_set: EvaluationSet,
    judge: str,
    settings: Conditions,
) -> Exposure:
    """Arrange the scores of one exposure; raises NotMeasuredError when something is missing."""
    curves = paired_curves(scores, evaluation_set, judge=judge)
    guard = guard_of(scores, sets, exposure=evaluation_set.name, steps=curves.steps, settings=settings)
    harm = excess_harm(curves, guard=guard, settings=settings)
    gate = worst_step(
        harm.control,
        steps=harm.steps,
        counts=harm.control_counts,
        threshold=harm.threshold,
        lowest=harm.lowest,
        evaluation_set=evaluation_set,
        settings=settings,
        name=f"{evaluation_set.name}/control_broken",
    )
    control_crosses = (mean(harm.control) > harm.threshold) & harm.control_counts
    defended_crosses = (mean(harm.defended) > harm.threshold) & harm.defended_counts
    last = int(harm.steps[-1])
    crosses = {Arm.CONTROL: bool(control_crosses.any()), Arm.DEFENDED: bool(defended_crosses.any())}
    return Exposure(
        evaluation_set=evaluation_set,
        judge=judge,
        settings=settings,
        harm=harm,
        harm_if_broken=excess_harm(curves, guard=guard, settings=settings, broken_as=1.0),
        gate=gate,
        steps_control=int(first_step(control_crosses, steps=harm.steps, never=last)),
        steps_defended=int(first_step(defended_crosses, steps=harm.steps, never=last)),
        censored=tuple(arm for arm in Arm if not crosses[arm]),
        flags=evaluation_set.marks + guard.flags,
    )


def too_weak(exposure: Exposure) -> str:
    """The reason when the control was not broken."""
    gate = exposure.gate
    return (
        f"the attack is too weak to test anything: at step {gate.step}, the control's worst on the selection half, its "
        f"harm on the reporting half is not surely more than {exposure.harm.level} "
        f"(estimate {gate.interval.estimate:.2f}, lower bound {gate.interval.low:.2f})"
    )
