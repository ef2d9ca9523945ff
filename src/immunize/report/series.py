"""The curves of several runs, by what they show; seeds are kept apart until somebody averages them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from immunize.records import Run
from immunize.study import Claim
from immunize.types import Arm, Kind

EXPOSURES = ("seen", "in_domain", "cross_domain")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Values at steps."""

    steps: Sequence[int]
    values: Sequence[float]


class Curves:
    """Every curve of some runs, each measured on what the arm was tuned on."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._of = {run.id: _curves(run) for run in runs}

    def of(self, runs: Iterable[Run], *, tuned_on: str, metric: str, arm: Arm) -> list[Curve]:
        """One curve for each of the runs that has it."""
        found = (self._of[run.id].get((tuned_on, metric, arm)) for run in runs)
        return [curve for curve in found if curve is not None]


def _curves(run: Run) -> dict[tuple[str, str, Arm], Curve]:
    """By what was tuned on, metric and arm; without what is NaN."""
    points: dict[tuple[str, str, Arm], list[tuple[int, float]]] = {}
    for row in run.rows:
        if row.tuned_on is not None and row.tuned_on == row.measured_on and not math.isnan(row.value):
            points.setdefault((row.tuned_on, row.metric, row.arm), []).append((row.step, row.value))
    return {
        key: Curve(steps=[step for step, _ in found], values=[value for _, value in found])
        for key, found in points.items()
    }


def average(several: Sequence[Curve]) -> Curve:
    """The mean at every step that any of them has."""
    at: dict[int, list[float]] = {}
    for curve in several:
        for step, value in zip(curve.steps, curve.values, strict=True):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    return Curve(steps=steps, values=[sum(at[step]) / len(at[step]) for step in steps])


def sets_of(claim: Claim, kind: Kind) -> list[str]:
    """The names of a claim's sets of one kind; exposures from near to far."""
    names = dict.fromkeys(item.name for run in claim.runs for item in run.sets if item.kind is kind)
    return sorted(names, key=lambda name: EXPOSURES.index(name) if name in EXPOSURES else len(EXPOSURES))


def judge_of(runs: Sequence[Run]) -> str | None:
    """The judge whose curves are drawn: the first; None where nothing was judged."""
    return next((score.judge for run in runs for score in run.scores if score.metric == "harmfulness"), None)


def one_a_seed(runs: Sequence[Run]) -> list[Run]:
    """What no attack changes is the same in every cell of a seed: one run of each."""
    found = {run.manifest["config"]["seed"]: run for run in reversed(runs)}
    return [found[seed] for seed in sorted(found)]
