"""Which setting of a defense to choose: the grid of a study, judged on the selection prompts alone.

The reporting half of the prompts, on which a verdict *fails*, plays no part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from immunize.records import Run
from immunize.study import Claim, Study
from immunize.types import Arm, EvaluationSet, Half, Kind, Outcome, Score

MARGINS = {
    Kind.STABILITY: "stability_margin",
    Kind.BORDERLINE: "over_refusal_margin",
    Kind.TRAINABILITY: "trainability_margin",
    Kind.BENCHMARK: "stability_margin",
    Kind.TEXT: "stability_margin",
}
CAPABILITY = (Kind.STABILITY, Kind.BENCHMARK, Kind.TEXT)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One claim of a study on the selection half, over its cells and seeds.

    harm: mean harmfulness of the defended arm over exposures and measured steps after the first, as the checks count
    it; `broken` is the share of broken answers there, which are not harmful, and `harm_control` the harm of the
    control. Stability, over-refusal and trainability are the mean differences between the arms, of the worst task (or
    benchmark); None where there is none. `keeps` says whether all of them are within the margins of `conditions`.
    """

    name: str
    harm: float
    broken: float
    harm_control: float
    stability: float | None
    over_refusal: float | None
    trainability: float | None
    keeps: bool


def settings(study: Study) -> list[Setting]:
    """The settings of a study's defenses, best first: those that keep what the model can do, by harm, then broken."""
    found = [_setting(claim) for claim in study.claims if not claim.is_control]
    if not found:
        raise ValueError(f"study {study.name}: has no finished run of a defense to choose from")
    return sorted(found, key=lambda item: (not item.keeps, round(item.harm, 2), item.broken))


def _setting(claim: Claim) -> Setting:
    differences = {kind: _difference(claim, kind) for kind in MARGINS}
    margins = claim.runs[0].manifest["config"]["conditions"]
    return Setting(
        name=claim.name,
        harm=_attacked(claim.runs, Arm.DEFENDED, broken=0.0),
        broken=_attacked(claim.runs, Arm.DEFENDED, broken=1.0) - _attacked(claim.runs, Arm.DEFENDED, broken=0.0),
        harm_control=_attacked(claim.runs, Arm.CONTROL, broken=0.0),
        stability=min((found for kind in CAPABILITY if (found := differences[kind]) is not None), default=None),
        over_refusal=differences[Kind.BORDERLINE],
        trainability=differences[Kind.TRAINABILITY],
        keeps=all(value is None or value >= -margins[MARGINS[kind]] for kind, value in differences.items()),
    )


def _attacked(runs: Iterable[Run], arm: Arm, *, broken: float) -> float:
    """Mean harmfulness under attack, each broken answer counting as `broken`."""
    values = [
        _mean(score, item, broken=broken)
        for run in runs
        for item in _sets(run, Kind.EXPOSURE)
        for score in run.scores
        if (score.arm, score.tuned_on, score.measured_on) == (arm, item.name, item.name)
        and score.metric == "harmfulness"
        and score.step > 0
    ]
    return float(numpy.mean(values))


def _difference(claim: Claim, kind: Kind) -> float | None:
    """The mean difference between the arms, of the task where it is worst; at the last step of what is tuned on."""
    names = dict.fromkeys(item.name for run in claim.runs for item in _sets(run, kind))
    found = []
    for name in names:
        tuned_on = name if kind is Kind.TRAINABILITY else None
        own = []
        for run in claim.runs:
            (item,) = [item for item in _sets(run, kind) if item.name == name]
            scores = [score for score in run.scores if (score.tuned_on, score.measured_on) == (tuned_on, name)]
            last = {arm: max((s for s in scores if s.arm is arm), key=lambda s: s.step) for arm in Arm}
            own.append(_mean(last[Arm.DEFENDED], item) - _mean(last[Arm.CONTROL], item))
        found.append(float(numpy.mean(own)))
    return min(found) if found else None


def _sets(run: Run, kind: Kind) -> Sequence[EvaluationSet]:
    return [item for item in run.sets if item.kind is kind]


def _mean(score: Score, item: EvaluationSet, *, broken: float | None = None) -> float:
    """Over the items of the selection half."""
    values = numpy.asarray(score.scores)
    if broken is not None:
        values = numpy.where([outcome is Outcome.BROKEN for outcome in score.outcomes], broken, values)
    return float(values[[half is Half.SELECTION for half in item.halves]].mean())
