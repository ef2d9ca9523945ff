"""What the report of a study shows, assembled from its records; how it looks is the page's affair."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from immunize.records import Run
from immunize.report.benign_panels import stability_panel, training_panels
from immunize.report.beside import Comparison, compare
from immunize.report.conclusions import CONDITIONS, conclusion, speaking, verdict_of
from immunize.report.costs import CostComparison, costs
from immunize.report.drawing import Panel
from immunize.report.gaps import Gap, gaps
from immunize.report.grid import Fact, facts
from immunize.report.harm_panels import HarmRow, harm_rows
from immunize.report.later_judges import LaterJudge, later_judges
from immunize.report.map_panels import check_names
from immunize.report.matrix import Matrix, matrix
from immunize.report.paper_tables import PaperTable
from immunize.report.series import Curves, one_a_seed
from immunize.report.step_panels import step_panels
from immunize.report.verdicts import guarded, settings, verdicts
from immunize.study import Claim, Study
from immunize.types import Check, StudyCheck, Verdict


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One question and its answer, with the runs that it was read from: those of the worst cell, one a seed."""

    item: StudyCheck
    runs: Sequence[Run]
    speaks: bool


@dataclass(frozen=True, kw_only=True)
class GuardRow:
    """One check with the utility guard and without."""

    name: str
    without: Check
    guarded: Check


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run with its own verdicts, by check."""

    run: Run
    cell: str
    seed: int
    checks: Mapping[str, Check]


@dataclass(frozen=True, kw_only=True)
class ClaimView:
    """Everything about one defense."""

    anchor: str
    claim: Claim
    conclusion: str
    conditions: Mapping[str, Verdict | None]
    rows: Sequence[CheckRow]
    facts: Sequence[Fact]
    harm: Sequence[HarmRow]
    steps: Sequence[Panel]
    training: Sequence[Panel]
    stability: Panel | None
    matrix: Matrix
    guard: Sequence[GuardRow]
    runs: Sequence[RunRow]

    @property
    def name(self) -> str:
        return self.claim.name

    @property
    def checks(self) -> list[StudyCheck]:
        return [row.item for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """The whole report."""

    study: Study
    claims: Sequence[ClaimView]
    check_names: Sequence[str]
    gaps: Sequence[Gap]
    comparisons: Sequence[Comparison]
    costs: Sequence[CostComparison]
    later_judges: Sequence[LaterJudge]

    @property
    def verdicts(self) -> dict[str, list[StudyCheck]]:
        """By claim, without the undefended model."""
        return {view.name: view.checks for view in self.claims if not view.claim.is_control}

    @property
    def factors(self) -> dict[str, list[str]]:
        """What the runs differ in, values in their own order."""
        return {key: sorted(values, key=_in_order) for key, values in self.study.factors.items()}

    @property
    def open_questions(self) -> list[tuple[ClaimView, CheckRow]]:
        """What the study could not decide, each with its reason."""
        return [
            (view, row)
            for view in self.claims
            for row in view.rows
            if row.speaks and row.item.check.verdict is Verdict.UNDETERMINED
        ]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for view in self.claims for seed in view.claim.seeds})


def assemble(study: Study, *, papers: Sequence[PaperTable] = ()) -> StudyView:
    """Read everything that is shown out of a study; this is where the statistics are computed.

    `papers` are the tables that it is shown beside.
    """
    claims = [_claim(claim, anchor=f"claim-{index}") for index, claim in enumerate(study.claims, start=1)]
    found = {view.name: view.checks for view in claims}
    return StudyView(
        study=study,
        claims=claims,
        check_names=check_names(found),
        gaps=gaps(study),
        comparisons=[item for table in papers if table.measure != "cost" for item in compare(study, table)],
        costs=[costs(study, table) for table in papers if table.measure == "cost"],
        later_judges=later_judges(study, found),
    )


def _claim(claim: Claim, *, anchor: str) -> ClaimView:
    checks, guard, text = _judged(claim)
    spoken = {id(item) for item in speaking(checks)}
    curves = Curves(claim.runs)
    return ClaimView(
        anchor=anchor,
        claim=claim,
        conclusion=text,
        conditions={condition: verdict_of(checks, condition) for condition in CONDITIONS},
        rows=[CheckRow(item=item, runs=_runs_of(item, claim), speaks=id(item) in spoken) for item in checks],
        facts=facts(claim),
        harm=harm_rows(claim, curves),
        steps=step_panels(claim),
        training=training_panels(claim, curves),
        stability=stability_panel(claim, checks),
        matrix=matrix(claim, curves),
        guard=guard,
        runs=[
            RunRow(
                run=run,
                cell=cell,
                seed=run.manifest["config"]["seed"],
                checks={check.name: check for check in run.checks},
            )
            for cell, runs in claim.cells.items()
            for run in runs
        ],
    )


def _judged(claim: Claim) -> tuple[list[StudyCheck], list[GuardRow], str]:
    """The verdicts, the same under the other guard, and what they come to.

    Runs that cannot be compared spoil their own claim, not the report of the others.
    """
    if claim.is_control:
        return [], [], "the undefended model: curves, and nothing to check."
    try:
        checks = list(verdicts(claim))
        return checks, _guard(claim, checks), conclusion(checks)
    except ValueError as error:
        return [], [], f"cannot be judged: {error}."


def _in_order(value: str) -> tuple[float, str]:
    """Numbers as numbers, before words."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _runs_of(item: StudyCheck, claim: Claim) -> Sequence[Run]:
    if item.worst_cell is not None and item.worst_cell in claim.cells:
        return claim.cells[item.worst_cell]
    return one_a_seed(claim.runs)


def _guard(claim: Claim, checks: Sequence[StudyCheck]) -> list[GuardRow]:
    """[] where the guard was not measured."""
    is_on = settings(claim).utility_guard
    other = {item.check.name: item.check for item in speaking(guarded(claim, on=not is_on))}
    own = {item.check.name: item.check for item in speaking(checks)}
    return [
        GuardRow(name=name, without=check if is_on else own[name], guarded=own[name] if is_on else check)
        for name, check in other.items()
        if name in own
    ]
