"""The rows of curve.jsonl: means over the items of one measurement, with what had been spent by then."""

from math import isnan, nan
from statistics import fmean

from immunize.data.answers import Cost
from immunize.types import Arm, Generation, Outcome, Row, Score


def mean_row(item: Score, cost: Cost) -> Row:
    """The mean of one array; harmfulness counts broken answers as 0, and is missing where any score is."""
    values = list(item.scores)
    if item.outcomes:
        pairs = zip(item.scores, item.outcomes, strict=True)
        values = [0.0 if outcome is Outcome.BROKEN and not isnan(value) else value for value, outcome in pairs]
    metric = item.metric if item.judge == item.measured_on else f"{item.judge}/{item.metric}"
    return _make_row(item.arm, item.tuned_on, item.measured_on, metric, values, cost)


def share_rows(item: Score, cost: Cost) -> list[Row]:
    """The share of each outcome; missing where a score is, which has no outcome."""
    lacks = any(map(isnan, item.scores))
    return [
        _make_row(
            item.arm,
            item.tuned_on,
            item.measured_on,
            f"{item.judge}/{outcome}",
            [nan if lacks else float(found is outcome) for found in item.outcomes],
            cost,
        )
        for outcome in Outcome
        if item.outcomes
    ]


def loss_row(arm: Arm, generation: Generation, cost: Cost, *, tuned_on: str | None) -> Row:
    """The mean loss of the reference answers (nats)."""
    return _make_row(
        arm,
        tuned_on,
        generation.measured_on,
        "loss",
        list(generation.losses),
        cost,
    )


def _make_row(arm: Arm, tuned_on: str | None, measured_on: str, metric: str, values: list[float], cost: Cost) -> Row:
    return Row(
        arm=arm,
        tuned_on=tuned_on,
        measured_on=measured_on,
        step=cost.step,
        examples=cost.examples,
        tokens=cost.tokens,
        flops=cost.flops,
        metric=metric,
        value=fmean(values),
        n=len(values),
    )
