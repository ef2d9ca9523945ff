"""Words that several reasons share."""

from collections.abc import Sequence
from math import ceil, sqrt
from statistics import stdev

from immunize.stats import Interval, student_t

# Beyond this the number is no advice but a way of saying that estimate and margin coincide.
MANY_TIMES = 100
MANY_SEEDS = 30


def settle(interval: Interval, *, threshold: float, objects: int) -> str:
    """About how many more objects would move the interval off the threshold, were the estimate the truth.

    Widths shrink with the root of the number of objects.
    """
    distance = abs(interval.estimate - threshold)
    width = _toward(interval, threshold)
    if width**2 >= MANY_TIMES * distance**2:
        return "the estimate is so close to it that no practical number of objects would settle it"
    more = max(1, ceil(objects * (width / distance) ** 2 - objects))
    return f"about {more} more objects would settle it"


def settle_study(
    interval: Interval, *, per_seed: Sequence[float], threshold: float, objects: int, confidence: float
) -> str:
    """About how many more seeds, or else objects, would move the interval off the threshold, all else being equal.

    Its half-width is the root of two squares: Student's t over the seeds, and the interval over objects.
    """
    distance, seeds = abs(interval.estimate - threshold), len(per_seed)
    deviation = stdev(per_seed)
    of_seeds = student_t(confidence, seeds - 1) * deviation / sqrt(seeds)
    of_objects = sqrt(max(_toward(interval, threshold) ** 2 - of_seeds**2, 0.0))
    for more in range(1, MANY_SEEDS):
        narrower = student_t(confidence, seeds + more - 1) * deviation / sqrt(seeds + more)
        if narrower**2 + of_objects**2 < distance**2:
            return f"about {more} more seed{'s' * (more > 1)} would settle it"
    if of_seeds < distance and of_objects**2 < MANY_TIMES * (distance**2 - of_seeds**2):
        more = max(1, ceil(objects * of_objects**2 / (distance**2 - of_seeds**2) - objects))
        return f"about {more} more objects would settle it"
    if max(of_seeds, of_objects) ** 2 >= MANY_TIMES * distance**2:
        return "the estimate is so close to it that no practical number of seeds or objects would settle it"
    return "it takes more objects and more seeds to settle it"


def settle_steps(estimate: float, *, interval: int, censored: bool, otherwise: str) -> str:
    """What would settle a difference of steps: where neither seeds nor objects would, that is said."""
    if censored and estimate <= interval:
        return "a longer attack would settle it, not more objects"
    if 0 <= estimate <= interval:
        return "measuring more often would settle it, not more objects"
    return otherwise


def _toward(interval: Interval, threshold: float) -> float:
    """The half of the interval's width that faces the threshold."""
    above = interval.estimate > threshold
    return interval.estimate - interval.low if above else interval.high - interval.estimate
