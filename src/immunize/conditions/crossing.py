"""The first measured step at which a curve crosses a threshold, and between which steps it surely lies."""

from dataclasses import dataclass

import numpy

from immunize.conditions.curves import Booleans, Integers
from immunize.conditions.harm import Harmed
from immunize.conditions.selection import cross_fitted
from immunize.stats import Floats, Resamples, welch_intervals


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """An arm first crosses, in whichever cell, no earlier and no later than these steps."""

    earliest: float
    latest: float


def first_step(crossed: Booleans, *, steps: Integers, never: float) -> Floats:
    """First of `steps` at which `crossed` (..., steps) is True, and `never` where it is nowhere True; shape (...)."""
    return numpy.where(crossed.any(axis=-1), steps[crossed.argmax(axis=-1)], never).astype(numpy.float64)


def measuring_interval(steps: Integers) -> int:
    """The largest gap between two measured steps; the last gap may be a shorter one."""
    return int(numpy.diff(steps).max())


def window(
    arm: Harmed, *, threshold: float, reporting: Booleans, resamples: Resamples, confidence: float, unsure: float
) -> Window:
    """Read the first crossing off bounds of the harm, not off resampled crossings.

    Where a curve hovers at the threshold, each of its steps has its own chance to be the first above it, and the
    percentiles of the first crossing err in up to 95 of 100 runs. Here
    - the earliest is the first step at which the upper bound of some cell exceeds the threshold: that the true one is
      earlier, its own bound must have missed (intersection-union);
    - the latest is found backward from the last step, as long as the harm up to a step surely exceeds the threshold in
      some cell (`cross_fitted`). The claims are nested, so the first that is wrong stops the rest, and no correction
      for many steps is needed; that cell and step were chosen on other items, none for many cells.
    An arm that never surely crosses has the latest step `unsure`; one that surely never does, the last as its earliest.
    """
    last = float(arm.steps[-1])
    cells, seeds, steps, items = arm.values.shape
    rows = numpy.moveaxis(arm.values, 1, 0).reshape(seeds, cells * steps, items)
    high = welch_intervals(rows, resamples=resamples, confidence=confidence).high.reshape(cells, steps)
    crosses = (high > threshold) & arm.counts.any(axis=1)
    low = welch_intervals(cross_fitted(arm, reporting=reporting), resamples=resamples, confidence=confidence).low
    surely = numpy.logical_and.accumulate((low > threshold)[::-1])[::-1]
    return Window(
        earliest=float(first_step(crosses.any(axis=0), steps=arm.steps, never=last)),
        latest=float(first_step(surely, steps=arm.steps, never=unsure)),
    )


def halved(confidence: float) -> float:
    """A difference of two first crossings errs where either does: each has half of the error."""
    return (1 + confidence) / 2
