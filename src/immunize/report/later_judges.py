"""A study's verdicts as they would have been under a judge that was asked later, beside those that it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from immunize.conditions.study import Replicate, check_study
from immunize.judgement import Said, read
from immunize.report.conclusions import speaking
from immunize.report.verdicts import replicates, settings
from immunize.study import Claim, Study
from immunize.types import StudyCheck


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """One check of one defense under the earlier judges and under the later one."""

    defense: str
    earlier: StudyCheck
    later: StudyCheck


@dataclass(frozen=True, kw_only=True)
class LaterJudge:
    """One judge that was asked later; `agreements` are sentences, one for each earlier judge."""

    name: str
    agreements: Sequence[str]
    opinions: Sequence[Opinion]

    @property
    def changed(self) -> int:
        """In how many checks the verdict is another."""
        return sum(item.earlier.check.verdict is not item.later.check.verdict for item in self.opinions)


def later_judges(study: Study, found: Mapping[str, Sequence[StudyCheck]]) -> list[LaterJudge]:
    """Every judge of the study's `judgements`; `found` are the verdicts of each claim that has any."""
    judges = []
    for said in read(study.path):
        opinions: list[Opinion] = []
        for claim in study.claims:
            if found.get(claim.name):
                opinions += _opinions(claim, said, found[claim.name])
        judges.append(
            LaterJudge(
                name=said.judge, agreements=[item.in_words(said.judge) for item in said.agreements], opinions=opinions
            )
        )
    return judges


def _opinions(claim: Claim, said: Said, found: Sequence[StudyCheck]) -> list[Opinion]:
    """The checks that a judge has a part in. A run that was not judged later is missing, and nothing is imputed."""
    cells: dict[str, list[Replicate]] = {}
    for label, runs in claim.cells.items():
        cells[label] = []
        for run, item in zip(runs, replicates(runs), strict=True):
            unjudged = [score for score in item.scores if not score.outcomes]
            cells[label].append(replace(item, scores=[*unjudged, *said.scores.get(run.id, ())]))
    later = {item.check.name: item for item in check_study(cells, settings(claim)) if item.check.judge == said.judge}
    return [
        Opinion(defense=claim.name, earlier=item, later=later[item.check.name])
        for item in speaking(found)
        if item.check.name in later
    ]
