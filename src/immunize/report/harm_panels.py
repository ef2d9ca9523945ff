"""Harmfulness over the attack's steps, a panel for each attack cell and exposure; below it what the answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from immunize.conditions.bands import harm_band
from immunize.conditions.settings import Conditions
from immunize.records import Run
from immunize.report.drawing import (
    SMALL,
    TEXT,
    Area,
    Axes,
    Line,
    Mark,
    Panel,
    Words,
    band,
    box,
    frame,
    shortened,
    whole_ticks,
)
from immunize.report.series import Curves, average, judge_of, sets_of
from immunize.report.verdicts import replicates, settings
from immunize.study import Claim
from immunize.types import Arm, Kind, Outcome

WIDTH, HEIGHT = 326.0, 226.0
LEFT, TOP = 30.0, 42.0
PLOT, STRIP = 112.0, 30.0
DASHES: Mapping[Arm, tuple[float, float] | None] = {Arm.CONTROL: (5.0, 3.0), Arm.DEFENDED: None}
IN_FRONT = (Arm.DEFENDED, Arm.CONTROL)  # dashes over a line: both are seen where they coincide
SHARES = (Outcome.HARMFUL, Outcome.BROKEN, Outcome.REFUSED)


@dataclass(frozen=True, kw_only=True)
class HarmRow:
    """The panels of one attack cell, one an exposure."""

    cell: str
    panels: Sequence[Panel]


def harm_rows(claim: Claim, curves: Curves) -> list[HarmRow]:
    """All panels of a claim, rows in the order of its cells; [] where nothing was judged."""
    judge = judge_of(claim.runs)
    if judge is None:
        return []
    exposures = sets_of(claim, Kind.EXPOSURE)
    chosen = settings(claim)
    return [
        HarmRow(
            cell=cell,
            panels=[
                _panel(cell, exposure, judge=judge, runs=runs, chosen=chosen, curves=curves, name=claim.name)
                for exposure in exposures
            ],
        )
        for cell, runs in claim.cells.items()
    ]


def legend(*, defended: bool, harm: bool = True) -> Panel:
    """What the inks and dashes mean; without `harm`, those of the arms alone."""
    marks: list[Mark] = []
    left = 0.0
    for arm in Arm if defended else (Arm.CONTROL,):
        marks.append(Area(points=box(left, 3, 24, 10), ink=str(arm), opacity=0.16))
        marks.append(Line(points=((left, 8), (left + 24, 8)), ink=str(arm), width=1.8, dashes=DASHES[arm]))
        marks.append(Words(x=left + 29, y=12, text=str(arm), size=11))
        left += 90
    if not harm:
        return Panel(title="Legend", width=left, height=18, marks=marks)
    marks.append(Line(points=((left, 8), (left + 24, 8)), ink="limit", dashes=(1.5, 2.5), width=1.2))
    marks.append(Words(x=left + 29, y=12, text="limit", size=11))
    left += 66
    for outcome in SHARES:
        marks.append(Area(points=box(left, 3, 12, 10), ink=str(outcome), opacity=1))
        marks.append(Words(x=left + 17, y=12, text=str(outcome), size=11))
        left += 68
    return Panel(title="Legend", width=left, height=18, marks=marks)


def _panel(
    cell: str, exposure: str, *, judge: str, runs: Sequence[Run], chosen: Conditions, curves: Curves, name: str
) -> Panel:
    bands = harm_band(replicates(runs), exposure=exposure, judge=judge, settings=chosen)
    marks: list[Mark] = [
        Words(x=0, y=TEXT, text=f"attack: {exposure.replace('_', ' ')}", size=TEXT, bold=True),
        Words(x=0, y=TEXT + 15, text=shortened(cell), ink="muted"),
    ]
    last = max((int(found.steps[-1]) for found in bands.values() if len(found.steps)), default=1)
    axes = Axes(left=LEFT, top=TOP, width=WIDTH - LEFT - 8, height=PLOT, x=(0, last))
    bottom = TOP + PLOT + 10 + STRIP
    marks += frame(axes, x_ticks=whole_ticks(last), y_ticks=(0, 0.5, 1), x_labels_at=bottom + 14)
    marks.append(Words(x=axes.left, y=bottom + 27, text="attack steps", ink="muted"))
    if not bands:
        marks.append(Words(x=axes.left + 8, y=axes.top + 24, text="not measured", ink="muted"))
        return Panel(title=f"{name}, {cell}, {exposure}: not measured", width=WIDTH, height=HEIGHT, marks=marks)
    for arm in IN_FRONT:
        if arm in bands:
            marks += _curve(bands[arm], axes=axes, arm=arm)
    limit = _limit(bands, chosen)
    if limit is not None:
        at = axes.down(limit)
        marks.append(Line(points=((axes.left, at), (axes.right, at)), ink="limit", dashes=(1.5, 2.5), width=1.2))
    arm = Arm.DEFENDED if Arm.DEFENDED in bands else Arm.CONTROL
    marks += _strip(curves, runs, exposure=exposure, judge=judge, arm=arm, last=last)
    ends = ", ".join(f"{arm} {float(found.mean[-1]):.2f}" for arm, found in bands.items())
    title = f"Harmfulness over attack steps, {name}, {cell}, {exposure}; at the last step: {ends}"
    return Panel(title=title, width=WIDTH, height=HEIGHT, marks=marks)


def _curve(found: Any, *, axes: Axes, arm: Arm) -> list[Mark]:
    steps = [float(step) for step in found.steps]
    means = [axes.at(x, float(y)) for x, y in zip(steps, found.mean, strict=True)]
    low, high = list(map(float, found.low)), list(map(float, found.high))
    return [
        band(steps, low, high, axes=axes, ink=str(arm)),
        Line(points=means, ink=str(arm), width=1.8, dashes=DASHES[arm]),
    ]


def _limit(bands: Mapping[Arm, Any], chosen: Conditions) -> float | None:
    """The harm that is still acceptable: an absolute one, or the guarded model's and the margin."""
    if chosen.threshold is not None:
        return chosen.threshold
    return float(bands[Arm.CONTROL].mean[0]) + chosen.margin if Arm.CONTROL in bands else None


def _strip(curves: Curves, runs: Sequence[Run], *, exposure: str, judge: str, arm: Arm, last: int) -> list[Mark]:
    """Shares of harmful, broken and refused answers, stacked."""
    axes = Axes(left=LEFT, top=TOP + PLOT + 10, width=WIDTH - LEFT - 8, height=STRIP, x=(0, last))
    found = {
        outcome: average(curves.of(runs, tuned_on=exposure, metric=f"{judge}/{outcome}", arm=arm)) for outcome in SHARES
    }
    steps = found[Outcome.HARMFUL].steps
    if not steps or any(curve.steps != steps for curve in found.values()):
        return []
    below = [0.0] * len(steps)
    marks: list[Mark] = [Words(x=0, y=axes.bottom - 10, text="share", ink="muted", size=SMALL - 1)]
    for outcome, curve in found.items():
        above = [base + value for base, value in zip(below, curve.values, strict=True)]
        stacked = band([float(step) for step in steps], below, above, axes=axes, ink=str(outcome))
        marks.append(Area(points=stacked.points, ink=stacked.ink))
        below = above
    return marks
