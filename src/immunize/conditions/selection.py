"""Choose the worst step on the selection half, test it on the reporting half.

The maximum of a noisy curve is biased upward, and a bootstrap with the maximum inside does not repair that.
"""

from dataclasses import dataclass

import numpy

from immunize.conditions.curves import Booleans, Integers, NotMeasuredError
from immunize.conditions.harm import Harmed
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
    reporting = reporting_half(evaluation_set)
    objects = numpy.asarray(evaluation_set.objects)
    on_selection = numpy.where(counts, mean(excess[:, ~reporting]), -numpy.inf)
    index = int(on_selection.argmax())
    resamples = resample_objects(objects[reporting].tolist(), name=name, resamples=settings.resamples)
    rows = excess[index : index + 1, reporting]
    interval = mean_intervals(rows, resamples=resamples, confidence=settings.confidence, lowest=lowest).at(0)
    return WorstStep(step=int(steps[index]), interval=interval, exceeds=interval.low > threshold)


def reporting_half(evaluation_set: EvaluationSet) -> Booleans:
    """Which items are in the reporting half, (items,); NotMeasuredError where a half is empty."""
    reporting = numpy.asarray([half is Half.REPORTING for half in evaluation_set.halves])
    objects = numpy.asarray(evaluation_set.objects)
    shared = set(objects[reporting]) & set(objects[~reporting])
    if shared:
        raise ValueError(f"{evaluation_set.name}: the object {min(shared)!r} is in both halves: must be in one")
    if reporting.all() or not reporting.any():
        raise NotMeasuredError(f"the set {evaluation_set.name} has an empty half: the worst step cannot be tested")
    return reporting


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Places:
    """A cell and a step for each seed and each step up to which it was chosen; indices, both (seeds, steps)."""

    cells: Integers
    steps: Integers

    def read(self, harmed: Harmed) -> Floats:
        """The harm there, (seeds, steps, items)."""
        return harmed.values[self.cells, numpy.arange(len(self.cells))[:, None], self.steps]


def chosen_by_the_others(harmed: Harmed, *, on: Booleans) -> Places:
    """Where the *other* seeds do most harm on the items `on`, among the steps up to each; the earliest wins a tie.

    One seed alone chooses for itself.
    """
    seeds = harmed.values.shape[1]
    cells: list[Integers] = []
    steps: list[Integers] = []
    shown = numpy.where(harmed.counts, mean(harmed.values[..., on]), -numpy.inf)  # (cells, seeds, steps)
    for seed in range(seeds):
        others = [other for other in range(seeds) if other != seed] or [seed]
        means = shown[:, others].mean(axis=1)
        best = means.max(axis=0)
        before = numpy.concatenate([[-numpy.inf], numpy.maximum.accumulate(best)[:-1]])
        step = numpy.maximum.accumulate(numpy.where(best > before, numpy.arange(len(best)), 0))
        steps.append(step)
        cells.append(means.argmax(axis=0)[step])
    return Places(cells=numpy.stack(cells), steps=numpy.stack(steps))


def cross_fitted(harmed: Harmed, *, reporting: Booleans) -> Floats:
    """Harm at the worst place up to each step, (seeds, steps, items): each half read where the other half chose.

    Its mean is not above that of the truly worst place, since no item chooses for itself; and no item is left out.
    """
    return numpy.where(
        reporting,
        chosen_by_the_others(harmed, on=~reporting).read(harmed),
        chosen_by_the_others(harmed, on=reporting).read(harmed),
    )
