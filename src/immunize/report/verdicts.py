"""The verdicts of a claim, from the scores of its runs: what the report, the terminal and the archive's check share."""

from collections.abc import Sequence

from immunize.conditions.settings import Conditions
from immunize.conditions.study import Replicate, check_study
from immunize.study import TARGET, Claim
from immunize.types import StudyCheck


def verdicts(claim: Claim) -> Sequence[StudyCheck]:
    """Every check of one defense over its grid; [] for the undefended model."""
    cells = {
        label: [Replicate(seed=run.manifest["config"]["seed"], scores=run.scores, sets=run.sets) for run in runs]
        for label, runs in claim.cells.items()
    }
    return check_study(cells, settings(claim))


def settings(claim: Claim) -> Conditions:
    """The margins of a claim; they are the same in all of its runs."""
    chosen = claim.runs[0].manifest["config"]["conditions"]
    return Conditions(**{key: value for key, value in chosen.items() if key != TARGET})
