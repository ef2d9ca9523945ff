"""The first measured step at which a curve crosses a threshold."""

import numpy

from immunize.conditions.curves import Booleans, Integers
from immunize.stats import Floats


def first_step(crossed: Booleans, *, steps: Integers, never: float) -> Floats:
    """First of `steps` at which `crossed` (..., steps) is True, and `never` where it is nowhere True; shape (...)."""
    return numpy.where(crossed.any(axis=-1), steps[crossed.argmax(axis=-1)], never).astype(numpy.float64)


def measuring_interval(steps: Integers) -> int:
    """The largest gap between two measured steps; the last gap may be a shorter one."""
    return int(numpy.diff(steps).max())
