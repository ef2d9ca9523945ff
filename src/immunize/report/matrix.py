"""Generalization: what the defense was attacked with against what it has seen, one row an attack cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from immunize.records import Run
from immunize.report.map_panels import degree_class
from immunize.report.series import Curves, judge_of, sets_of
from immunize.report.step_panels import answer_of
from immunize.study import Claim
from immunize.types import Arm, Kind


@dataclass(frozen=True, kw_only=True)
class Seed:
    """What one run found: its degree of resistance, and harm at the last step by arm."""

    run: Run
    seed: int
    degree: float | None
    harm: Mapping[Arm, float]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One attack cell under one exposure, over its seeds."""

    seeds: Sequence[Seed]

    @property
    def degree(self) -> float | None:
        """The mean of the seeds that have one."""
        return _mean([seed.degree for seed in self.seeds if seed.degree is not None])

    @property
    def shade(self) -> int:
        return degree_class(self.degree)

    def harm(self, arm: Arm) -> float | None:
        return _mean([seed.harm[arm] for seed in self.seeds if arm in seed.harm])


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Rows are attack cells, columns exposures."""

    exposures: Sequence[str]
    rows: Mapping[str, Sequence[Entry]]

    @property
    def degrees(self) -> dict[str, list[float | None]]:
        return {cell: [entry.degree for entry in entries] for cell, entries in self.rows.items()}


def matrix(claim: Claim, curves: Curves) -> Matrix:
    """Degrees from the runs' own checks, harm from their curves."""
    exposures = sets_of(claim, Kind.EXPOSURE)
    judge = judge_of(claim.runs)
    return Matrix(
        exposures=exposures,
        rows={
            cell: [_entry(runs, exposure, judge=judge, curves=curves) for exposure in exposures]
            for cell, runs in claim.cells.items()
        },
    )


def _entry(runs: Sequence[Run], exposure: str, *, judge: str | None, curves: Curves) -> Entry:
    found = []
    for run in runs:
        harm = {
            arm: several[0].values[-1]
            for arm in Arm
            if (several := curves.of([run], tuned_on=exposure, metric=f"{judge}/harmfulness", arm=arm))
        }
        check = answer_of(run.checks, exposure)
        degree = check.degree if check else None
        found.append(Seed(run=run, seed=run.manifest["config"]["seed"], degree=degree, harm=harm))
    return Entry(seeds=found)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
