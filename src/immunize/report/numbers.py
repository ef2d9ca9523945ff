"""Numbers, and the names of judges, as every table of a study writes them."""

from immunize.stats import Interval
from immunize.types import Arm, Check

MINUS = "\N{MINUS SIGN}"
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}"
WEAK = {"keyword": "weak: without a phrase of refusal, any answer counts as harmful"}
AT_MOST = "\N{LESS-THAN OR EQUAL TO}"
RISES = ("stability/over_refusal", "stability/direct_requests")  # of something bad: a check holds below the limit


def number(value: float | None) -> str:
    """Two decimals, or a dash for what is not there."""
    return "-" if value is None else _rounded(value, 2)


def estimate(found: Interval, *, decimals: int = 2) -> str:
    """The middle of an interval alone."""
    return _rounded(found.estimate, decimals)


def bounds(found: Interval, *, decimals: int = 2) -> str:
    """An interval in brackets."""
    return f"[{_rounded(found.low, decimals)}, {_rounded(found.high, decimals)}]"


def with_interval(found: Interval | None, *, decimals: int = 2) -> str:
    """An estimate with its interval, or a dash."""
    return "-" if found is None else f"{estimate(found, decimals=decimals)} {bounds(found, decimals=decimals)}"


def _rounded(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # without the sign of a rounded zero


def limit(check: Check) -> str:
    """What the estimate is held against, with the side on which a check holds."""
    if check.threshold is None:
        return "-"
    at_least = check.name.startswith(("stability/", "trainability/")) and check.name not in RISES
    side = AT_LEAST if at_least else ">" if check.name == "resistance/cost" else AT_MOST
    return f"{side} {number(check.threshold)}"


def interval(check: Check) -> str:
    """The estimate with its interval."""
    if check.estimate is None or check.low is None or check.high is None:
        return number(check.estimate)
    return f"{number(check.estimate)} [{number(check.low)}, {number(check.high)}]"


def steps(check: Check, arm: Arm) -> str:
    """Steps to the threshold, with > where it was never crossed."""
    value = check.steps_control if arm is Arm.CONTROL else check.steps_defended
    return "-" if value is None else f"{'>' if arm in check.censored else ''}{value}"


def both_steps(check: Check) -> str:
    """Control/defended."""
    if check.steps_control is None and check.steps_defended is None:
        return "-"
    return "/".join(steps(check, arm) for arm in Arm)


def typeset(text: str) -> str:
    """With a true minus sign, for the page."""
    return text.replace("-", MINUS) if text != "-" else "\N{EN DASH}"


def named_judge(name: str) -> str:
    """A judge's name, with what is to be known of a coarse one."""
    return f"{name} ({WEAK[name]})" if name in WEAK else name
