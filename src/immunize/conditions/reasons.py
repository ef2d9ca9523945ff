"""Words that several reasons share."""

from math import ceil

from immunize.stats import Interval

# Beyond this the number is no advice but a way of saying that estimate and margin coincide.
MANY_TIMES = 100


def settle(interval: Interval, *, threshold: float, objects: int) -> str:
    """About how many more objects would move the interval off the threshold, were the estimate the truth.

    Widths shrink with the root of the number of objects.
    """
    distance = abs(interval.estimate - threshold)
    above = interval.estimate > threshold
    width = interval.estimate - interval.low if above else interval.high - interval.estimate
    if width**2 >= MANY_TIMES * distance**2:
        return "the estimate is so close to it that no practical number of objects would settle it"
    more = max(1, ceil(objects * (width / distance) ** 2 - objects))
    return f"about {more} more objects would settle it"
