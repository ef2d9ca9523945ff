"""Choose the worst step on the selection half, test it on the reporting half.

The maximum of a noisy curve is biased upward, and a bootstrap with the maximum inside does not repair that.
"""

from dataclasses import dataclass

import numpy

from immunize.conditions.curves import Booleans, Integers, NotMeasuredError
from immunize.conditions.settings import Conditions
from immunize.stats import Floats, Interval, mean, mean_intervals, resample_objects
from immunize.types import EvaluationSet, Half


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstStep:
    """The step with the largest mean on the selection half, and the interval at it on the reporting half."""

    step: int
    interval: Interval
    exceeds: bool


def worst_step(
    excess: Floats,
    *,
    steps: Integers,
    counts: Booleans,
    threshold: float,
    lowest: float,
    evaluation_set: EvaluationSet,
    settings: Conditions,
    name: str,
) -> WorstStep:
    """Is the mean of `excess` (steps, items) above `threshold` at its worst step? The earliest step wins a tie."""
    reporting = numpy.asarray([half is Half.REPORTING for half in evaluation_set.halves])
    objects = numpy.asarray(evaluation_set.objects)
    shared = set(objects[reporting]) & set(objects[~reporting])
    if shared:
        raise ValueError(f"{evaluation_set.name}: the object {min(shared)!r} is in both halves: must be in one")
    if reporting.all() or not reporting.any():
        raise NotMeasuredError(f"the set {evaluation_set.name} has an empty half: the worst step cannot be tested")
    on_selection = numpy.where(counts, mean(excess[:, ~reporting]), -numpy.inf)
    index = int(on_selection.argmax())
    resamples = resample_objects(objects[reporting].tolist(), name=name, resamples=settings.resamples)
    rows = excess[index : index + 1, reporting]
    interval = mean_intervals(rows, resamples=resamples, confidence=settings.confidence, lowest=lowest).at(0)
    return WorstStep(step=int(steps[index]), interval=interval, exceeds=interval.low > threshold)
