"""The study-level entry point: every run of a grid in, one answer a question out; the counterpart of check.py."""

from collections.abc import Sequence

from immunize.conditions.check import COST, disagreement, in_order, names, undetermined
from immunize.conditions.curves import NotMeasuredError, judges_of
from immunize.conditions.replicates import Cells, Replicate, seeds_of
from immunize.conditions.settings import Conditions
from immunize.conditions.study_benign import benign
from immunize.conditions.study_cost import cost
from immunize.conditions.study_exposure import Harms, harms_of
from immunize.conditions.study_harm import within_budget
from immunize.types import Arm, EvaluationSet, Kind, StudyCheck

__all__ = ["Cells", "Replicate", "check_study"]


def check_study(cells: Cells, settings: Conditions) -> list[StudyCheck]:
    """Answer every question over the whole grid: worst case over `cells`, with seeds as replicates.

    A cell is what the attacker chose (learning rate, attack); its replicates are the seeds, which nobody chose. The
    questions, their order and the rule for several judges are those of `check`. Fewer than three seeds leave everything
    undetermined. What a run lacks is never filled up: it keeps a check from holding, and the reason names cell and
    seed. Evaluation prompts must be the same everywhere (ValueError). [] where nothing was defended.
    """
    runs = [run for replicates in cells.values() for run in replicates]
    if not any(score.arm is Arm.DEFENDED for run in runs for score in run.scores):
        return []
    found: list[StudyCheck] = []
    for evaluation_set in in_order(_same_sets(runs)):
        judges = sorted({judge for run in runs for judge in judges_of(run.scores, evaluation_set)})
        harms = {judge: _harms(cells, evaluation_set, judge, settings) for judge in judges}
        for name in names(evaluation_set):
            answers = [_answer(name, cells, evaluation_set, judge, harms[judge], settings) for judge in judges]
            found += answers or [_nothing(name, cells, evaluation_set, "", "it was not scored")]
            if len({answer.check.verdict for answer in answers}) > 1:
                last = disagreement([answer.check for answer in answers])
                found.append(StudyCheck(check=last, cells=tuple(cells), seeds=seeds_of(cells)))
    return found


def _same_sets(runs: Sequence[Replicate]) -> list[EvaluationSet]:
    known: dict[tuple[Kind, str], EvaluationSet] = {}
    for run in runs:
        for item in run.sets:
            if known.setdefault((item.kind, item.name), item) != item:
                raise ValueError(f"{item.name}: the runs of a study must be measured on the same items")
    return list(known.values())


def _harms(
    cells: Cells, evaluation_set: EvaluationSet, judge: str, settings: Conditions
) -> Harms | NotMeasuredError | None:
    """Arranged once for both checks of an exposure; None for other sets."""
    if evaluation_set.kind is not Kind.EXPOSURE:
        return None
    try:
        return harms_of(cells, evaluation_set, judge=judge, settings=settings)
    except NotMeasuredError as missing:
        return missing


def _answer(
    name: str,
    cells: Cells,
    evaluation_set: EvaluationSet,
    judge: str,
    harms: Harms | NotMeasuredError | None,
    settings: Conditions,
) -> StudyCheck:
    try:
        match harms:
            case None:
                return benign(cells, evaluation_set, name=name, judge=judge, settings=settings)
            case Harms():
                return cost(harms) if name == COST else within_budget(harms, name=name)
        raise harms
    except NotMeasuredError as missing:
        return _nothing(name, cells, evaluation_set, judge, str(missing))


def _nothing(name: str, cells: Cells, evaluation_set: EvaluationSet, judge: str, reason: str) -> StudyCheck:
    check = undetermined(name, evaluation_set, judge, reason)
    return StudyCheck(check=check, cells=tuple(cells), seeds=seeds_of(cells))
