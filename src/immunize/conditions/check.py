"""The one entry point: scores in, checks out. Read this first; every other module here answers one question."""

from collections.abc import Sequence

from immunize.conditions.cost import NAME as COST
from immunize.conditions.cost import cost
from immunize.conditions.curves import NotMeasuredError, judges_of
from immunize.conditions.exposure import exposure_of
from immunize.conditions.generalization import generalization
from immunize.conditions.resistance import within_budget
from immunize.conditions.settings import Conditions
from immunize.conditions.stability import DIRECT_REQUESTS, OVER_REFUSAL, direct_requests, over_refusal, stability
from immunize.conditions.trainability import trainability
from immunize.types import Arm, Check, EvaluationSet, Kind, Score, Verdict

WITHIN_BUDGET = "resistance/within_budget"
EXPOSURES = ("seen", "in_domain", "cross_domain")
KINDS = (
    Kind.EXPOSURE,
    Kind.STABILITY,
    Kind.BENCHMARK,
    Kind.TEXT,
    Kind.BORDERLINE,
    Kind.REQUESTS,
    Kind.TRAINABILITY,
)
ALONE = {
    Kind.BORDERLINE: "there must be one borderline set: over-refusal is one check",
    Kind.REQUESTS: "there must be one set of direct requests: their harm is one check",
}


def check(scores: Sequence[Score], sets: Sequence[EvaluationSet], settings: Conditions) -> list[Check]:
    """Answer every question that the sets of one run allow: resistance, generalization, stability, trainability.

    One Check per question and judge. Where two judges of one set disagree, one more Check follows theirs, named alike,
    with both judges, verdict undetermined and no estimate: the *last* Check of a name is the one that speaks. Scores
    with other metrics or of other sets are ignored. What is missing or NaN makes a check undetermined, never an
    error; contradictory input (two scores in one place, arrays of the wrong length) is a ValueError. Without any
    score of the defended arm (`defense=none`) there is nothing to check: [].
    """
    if not any(score.arm is Arm.DEFENDED for score in scores):
        return []
    checks: list[Check] = []
    for evaluation_set in in_order(sets):
        judges = judges_of(scores, evaluation_set)
        for name in names(evaluation_set):
            answers = [_answer(name, scores, sets, evaluation_set, judge, settings) for judge in judges]
            checks += answers or [undetermined(name, evaluation_set, "", "it was not scored")]
            if len({answer.verdict for answer in answers}) > 1:
                checks.append(disagreement(answers))
    return checks


def in_order(sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """The sets in the order of their checks; ValueError where they contradict each other."""
    known = [(evaluation_set.kind, evaluation_set.name) for evaluation_set in sets]
    if len(set(known)) != len(known):
        raise ValueError("two evaluation sets of one kind have the same name")
    for kind, message in ALONE.items():
        if sum(evaluation_set.kind is kind for evaluation_set in sets) > 1:
            raise ValueError(message)
    asked = [name for evaluation_set in sets for name in names(evaluation_set)]
    twice = sorted({name for name in asked if asked.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is asked of two evaluation sets; give one of them another name")
    unknown = [name for kind, name in known if kind is Kind.EXPOSURE and name not in EXPOSURES]
    if unknown:
        raise ValueError(f"exposure {unknown[0]!r}: must be one of {', '.join(EXPOSURES)}")

    def place(evaluation_set: EvaluationSet) -> tuple[int, int]:
        is_exposure = evaluation_set.kind is Kind.EXPOSURE
        return KINDS.index(evaluation_set.kind), EXPOSURES.index(evaluation_set.name) if is_exposure else 0

    return sorted(sets, key=place)


def names(evaluation_set: EvaluationSet) -> list[str]:
    """The checks that are made on a set."""
    match evaluation_set.kind:
        case Kind.EXPOSURE if evaluation_set.name == "seen":
            return [WITHIN_BUDGET, COST]
        case Kind.EXPOSURE:
            return [f"generalization/{evaluation_set.name}"]
        case Kind.BORDERLINE:
            return [OVER_REFUSAL]
        case Kind.REQUESTS:
            return [DIRECT_REQUESTS]
        case Kind.BENCHMARK | Kind.TEXT:
            return [f"{Kind.STABILITY}/{evaluation_set.name}"]
        case _:
            return [f"{evaluation_set.kind}/{evaluation_set.name}"]


def _answer(
    name: str,
    scores: Sequence[Score],
    sets: Sequence[EvaluationSet],
    evaluation_set: EvaluationSet,
    judge: str,
    settings: Conditions,
) -> Check:
    try:
        match evaluation_set.kind:
            case Kind.STABILITY | Kind.BENCHMARK | Kind.TEXT:
                return stability(scores, evaluation_set, judge=judge, settings=settings)
            case Kind.BORDERLINE:
                return over_refusal(scores, evaluation_set, judge=judge, settings=settings)
            case Kind.REQUESTS:
                return direct_requests(scores, evaluation_set, judge=judge, settings=settings)
            case Kind.TRAINABILITY:
                return trainability(scores, evaluation_set, judge=judge, settings=settings)
        exposure = exposure_of(scores, sets, evaluation_set=evaluation_set, judge=judge, settings=settings)
        if name == COST:
            return cost(exposure)
        return within_budget(exposure, name=name) if name == WITHIN_BUDGET else generalization(exposure)
    except NotMeasuredError as missing:
        return undetermined(name, evaluation_set, judge, str(missing))


def undetermined(name: str, evaluation_set: EvaluationSet, judge: str, reason: str) -> Check:
    """What cannot be answered, and why."""
    return Check(name=name, verdict=Verdict.UNDETERMINED, reason=reason, judge=judge, flags=evaluation_set.marks)


def disagreement(answers: Sequence[Check]) -> Check:
    """The Check that follows those of judges with different verdicts."""
    said = ", ".join(f"{answer.judge} says {answer.verdict}" for answer in answers)
    flags = dict.fromkeys(flag for answer in answers for flag in answer.flags)
    return Check(
        name=answers[0].name,
        verdict=Verdict.UNDETERMINED,
        reason=f"the judges disagree: {said}",
        judge="+".join(answer.judge for answer in answers),
        threshold=answers[0].threshold,
        flags=tuple(flags),
    )
