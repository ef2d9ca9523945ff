"""Placeholder: the study-level checks, worst run of the grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from immunize.conditions.check import check
from immunize.conditions.settings import Conditions
from immunize.types import EvaluationSet, Score, StudyCheck, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicate:
    """What one seed measured in one attack cell."""

    seed: int
    scores: Sequence[Score]
    sets: Sequence[EvaluationSet]


def check_study(cells: Mapping[str, Sequence[Replicate]], settings: Conditions) -> list[StudyCheck]:
    """Answer every question over the whole grid; [] without a defended arm."""
    found: dict[str, StudyCheck] = {}
    order = [Verdict.FAILS, Verdict.UNDETERMINED, Verdict.HOLDS]
    seeds = tuple(sorted({item.seed for runs in cells.values() for item in runs}))
    for label, runs in cells.items():
        for run in runs:
            for answer in check(run.scores, run.sets, settings):
                known = found.get(answer.name)
                if known is None or order.index(answer.verdict) < order.index(known.check.verdict):
                    found[answer.name] = StudyCheck(check=answer, cells=tuple(cells), seeds=seeds, worst_cell=label)
    return list(found.values())
