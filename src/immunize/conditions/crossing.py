"""The first measured step at which a curve crosses a threshold, and between which steps it surely lies."""

from dataclasses import dataclass

import numpy

from immunize.conditions.curves import Booleans, Integers
from immunize.conditions.harm import Harmed
from immunize.conditions.selection import cross_fitted
from immunize.stats import Floats, Resamples, welch_intervals

# A difference of two first crossings errs where either does, so they share the error: 1.5 and 1 of 2.5 %. Upper bounds
# have the larger part: at 1.25 % one harmful answer of 64, the same in each of three seeds, would be one too many.
EARLIEST = 0.6


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
    error = 1 - confidence
    bounds = welch_intervals(rows, resamples=resamples, confidence=1 - EARLIEST * error)
    crosses = (bounds.high.reshape(cells, steps) > threshold) & arm.counts.any(axis=1)
    worst = welch_intervals(
        cross_fitted(arm, reporting=reporting), resamples=resamples, confidence=1 - (1 - EARLIEST) * error
    )
    surely: Booleans = numpy.logical_and.accumulate((worst.low > threshold)[::-1])[::-1]
    anywhere: Booleans = numpy.any(crosses, axis=0)
    return Window(
        earliest=float(first_step(anywhere, steps=arm.steps, never=last)),
        latest=float(first_step(surely, steps=arm.steps, never=unsure)),
    )
