"""Scores arranged into arrays that are paired between the arms: same steps, same items, same order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from immunize.stats import Floats
from immunize.types import Arm, EvaluationSet, Kind, Outcome, Score

Booleans = NDArray[numpy.bool_]
Integers = NDArray[numpy.int64]

METRICS = {
    Kind.EXPOSURE: "harmfulness",
    Kind.STABILITY: "score",
    Kind.BORDERLINE: "answered",
    Kind.TRAINABILITY: "score",
    Kind.BENCHMARK: "score",
    Kind.TEXT: "minus_loss",
    Kind.REQUESTS: "harmfulness",
}
TUNED = (Kind.EXPOSURE, Kind.TRAINABILITY)
JUDGED = (Kind.EXPOSURE, Kind.REQUESTS)


class NotMeasuredError(Exception):
    """Something a check needs is missing or NaN; the message is the reason that the check is undetermined."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairedCurves:
    """Scores of both arms at the same steps: `steps` is (steps,), every other array (steps, items).

    The broken arrays tell which answers are broken; all False for sets without outcomes. A broken answer to a direct
    request is scored 0 here, one to an exposure's prompt as the judge scored it.
    """

    steps: Integers
    control: Floats
    defended: Floats
    control_broken: Booleans
    defended_broken: Booleans


def judges_of(scores: Sequence[Score], evaluation_set: EvaluationSet) -> list[str]:
    """The judges that scored this set for a check, by name; the guard's measurements do not count."""
    return sorted({score.judge for score in scores if belongs(score, evaluation_set)})


def paired_curves(scores: Sequence[Score], evaluation_set: EvaluationSet, *, judge: str) -> PairedCurves:
    """Arrange one judge's scores of one set; raises NotMeasuredError when any part is missing or NaN.

    A set that is tuned on needs step 0 and at least one more, the same in both arms; any other set needs step 0.
    A NaN makes the whole set unusable, also where the answer is broken: nothing is imputed.
    """
    if not evaluation_set.ids:
        raise NotMeasuredError(f"the set {evaluation_set.name} has no items")
    if evaluation_set.kind is Kind.TEXT and len(set(evaluation_set.objects)) < 2:
        raise NotMeasuredError(f"the text of {evaluation_set.name} has one window only, which has no spread")
    chosen = [score for score in scores if score.judge == judge and belongs(score, evaluation_set)]
    control = _by_step([score for score in chosen if score.arm is Arm.CONTROL])
    defended = _by_step([score for score in chosen if score.arm is Arm.DEFENDED])
    steps = _common_steps(control, defended, evaluation_set)
    of_arms = [[measured[step] for step in steps] for measured in (control, defended)]
    values = [_values(found, evaluation_set) for found in of_arms]
    broken = [_broken(found, evaluation_set) for found in of_arms]
    if evaluation_set.kind is Kind.REQUESTS:
        values = [numpy.where(is_broken, 0.0, found) for found, is_broken in zip(values, broken, strict=True)]
    return PairedCurves(
        steps=numpy.asarray(steps, dtype=numpy.int64),
        control=values[0],
        defended=values[1],
        control_broken=broken[0],
        defended_broken=broken[1],
    )


def belongs(score: Score, evaluation_set: EvaluationSet) -> bool:
    """Whether a score is one of those that the set's check reads."""
    name, kind = evaluation_set.name, evaluation_set.kind
    tuned_on = name if kind in TUNED else None
    return score.measured_on == name and score.metric == METRICS[kind] and score.tuned_on == tuned_on


def _by_step(scores: Sequence[Score]) -> dict[int, Score]:
    steps = {score.step: score for score in scores}
    if len(steps) != len(scores):
        first = scores[0]
        raise ValueError(f"two scores of {first.measured_on} in the {first.arm} arm by {first.judge} have one step")
    return steps


def _common_steps(control: dict[int, Score], defended: dict[int, Score], evaluation_set: EvaluationSet) -> list[int]:
    name = evaluation_set.name
    for arm, measured in (("control", control), ("defended", defended)):
        if 0 not in measured:
            raise NotMeasuredError(f"{name} was not measured at step 0 in the {arm} arm")
    if evaluation_set.kind not in TUNED:
        return [0]
    lonely = sorted(control.keys() ^ defended.keys())
    if lonely:
        arm = "control" if lonely[0] in control else "defended"
        raise NotMeasuredError(f"{name} was measured at step {lonely[0]} in the {arm} arm only")
    if len(control) < 2:
        raise NotMeasuredError(f"{name} was not measured after step 0")
    return sorted(control)


def _values(scores: Sequence[Score], evaluation_set: EvaluationSet) -> Floats:
    """The raw scores, (steps, items), finite and in [0, 1]; minus a loss is at most 0."""
    for score in scores:
        if len(score.scores) != len(evaluation_set.ids):
            raise ValueError(
                f"{score.measured_on} at step {score.step} in the {score.arm} arm has {len(score.scores)} scores: "
                f"must have {len(evaluation_set.ids)}, one for each item of the set"
            )
    values = numpy.asarray([score.scores for score in scores], dtype=numpy.float64)
    for score, row in zip(scores, values, strict=True):
        missing = int((~numpy.isfinite(row)).sum())
        if missing:
            raise NotMeasuredError(
                f"{score.judge} gave no score for {missing} of {len(row)} items of {score.measured_on} at step "
                f"{score.step} in the {score.arm} arm"
            )
        if evaluation_set.kind is Kind.TEXT:
            if row.max() > 0:
                raise ValueError(f"{score.judge} on {score.measured_on}: minus a loss must be at most 0")
        elif row.min() < 0 or row.max() > 1:
            raise ValueError(f"{score.judge} on {score.measured_on}: scores must lie in [0, 1]")
    return values


def _broken(scores: Sequence[Score], evaluation_set: EvaluationSet) -> Booleans:
    if evaluation_set.kind not in JUDGED:
        return numpy.zeros((len(scores), len(evaluation_set.ids)), dtype=numpy.bool_)
    for score in scores:
        if len(score.outcomes) != len(evaluation_set.ids):
            raise NotMeasuredError(
                f"the outcomes of {score.measured_on} at step {score.step} in the {score.arm} arm are missing"
            )
    return numpy.asarray([[outcome is Outcome.BROKEN for outcome in score.outcomes] for score in scores])
