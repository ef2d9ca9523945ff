"""Bands for pictures: the mean harm of each arm over attack steps, with the interval that verdicts are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from immunize.conditions.replicates import Replicate
from immunize.conditions.settings import Conditions
from immunize.stats import Floats, replicated_intervals, resample_objects
from immunize.types import Arm, Outcome, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """One curve; all of shape (steps,)."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def harm_band(
    replicates: Sequence[Replicate], *, exposure: str, judge: str, settings: Conditions
) -> Mapping[Arm, Band]:
    """The band of each arm that was measured: mean over seeds and prompts, a broken answer counting 0.

    A seed whose scores have a gap is left out of the picture (of a verdict it keeps the check from holding).
    """
    found: dict[Arm, Band] = {}
    for arm in Arm:
        curves = [curve for run in replicates if (curve := _curve(run, arm, exposure, judge))]
        steps = sorted(set[int]().union(*curves)) if curves else []
        whole = [curve for curve in curves if set(curve) == set(steps)]
        if not whole:
            continue
        values = numpy.stack([numpy.stack([curve[step] for step in steps]) for curve in whole])
        objects = next(item.objects for item in replicates[0].sets if item.name == exposure)
        resamples = resample_objects(objects, name=f"{exposure}/band", resamples=settings.resamples)
        band = replicated_intervals(values, resamples=resamples, confidence=settings.confidence, lowest=0.0)
        mean, low, high = (tuple(part.tolist()) for part in (band.estimate, band.low, band.high))
        found[arm] = Band(steps=tuple(steps), mean=mean, low=low, high=high)
    return found


def _curve(run: Replicate, arm: Arm, exposure: str, judge: str) -> dict[int, Floats]:
    """Harm of every item, by step; empty where a score is NaN."""
    chosen = [
        score
        for score in run.scores
        if (score.arm, score.tuned_on, score.measured_on) == (arm, exposure, exposure)
        and (score.judge, score.metric) == (judge, "harmfulness")
    ]
    curve = {score.step: _harm(score) for score in chosen}
    return curve if all(numpy.isfinite(values).all() for values in curve.values()) else {}


def _harm(score: Score) -> Floats:
    broken = numpy.asarray([outcome is Outcome.BROKEN for outcome in score.outcomes])
    return numpy.where(broken, 0.0, numpy.asarray(score.scores, dtype=numpy.float64))
