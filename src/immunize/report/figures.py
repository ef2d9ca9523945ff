"""The pictures of a study as files: one of all verdicts, and for each claim its curves and its other panels."""

import re
from collections.abc import Iterator

from immunize.report import harm_panels, step_panels
from immunize.report.drawing import Panel, composed
from immunize.report.map_panels import degree_map, verdict_map
from immunize.report.study import ClaimView, StudyView

LONGEST_NAME = 40


def figures(view: StudyView) -> dict[str, Panel]:
    """Pictures by the name of their files, without an ending; equal records give equal names."""
    found: dict[str, Panel] = {}
    if view.verdicts:
        found["verdicts"] = composed(f"Study {view.study.name}: verdicts", [[verdict_map(view.verdicts)]])
    for claim in view.claims:
        for kind, panel in _of_claim(claim):
            found[f"{_file_name(claim)}-{kind}"] = panel
    return found


def _of_claim(claim: ClaimView) -> Iterator[tuple[str, Panel]]:
    if claim.harm:
        legend = harm_panels.legend(defended=not claim.claim.is_control)
        title = f"{claim.name}: harmfulness over the attack"
        yield "harm", composed(title, [[legend], *(row.panels for row in claim.harm)])
    if claim.steps:
        width = len(claim.matrix.exposures) or 1
        rows = [claim.steps[start : start + width] for start in range(0, len(claim.steps), width)]
        yield "steps", composed(f"{claim.name}: steps to the limit", [[step_panels.legend()], *rows])
    if claim.matrix.exposures and not claim.claim.is_control:
        panel = degree_map("Degree of resistance", claim.matrix.exposures, claim.matrix.degrees)
        yield "generalization", composed(f"{claim.name}: degree of resistance", [[panel]])
    arms = [harm_panels.legend(defended=not claim.claim.is_control, harm=False)] if claim.training else []
    benign = [row for row in ([claim.stability] if claim.stability else [], arms, claim.training) if row]
    if benign:
        yield "benign", composed(f"{claim.name}: stability and trainability", benign)


def _file_name(claim: ClaimView) -> str:
    """Safe on every system; the number keeps apart what is alike without its signs."""
    number = claim.anchor.rpartition("-")[2]
    plain = re.sub(r"[^a-z0-9]+", "-", claim.name.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return f"{number}-{plain or 'claim'}"
