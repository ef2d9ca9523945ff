"""Steps to the threshold against learning rate, both arms, a panel for each exposure and kind of attack."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from immunize.records import Run
from immunize.report.conclusions import WITHIN_BUDGET
from immunize.report.drawing import TEXT, Area, Axes, Line, Mark, Panel, Words, box, frame, shortened, whole_ticks
from immunize.report.harm_panels import DASHES, LEFT, WIDTH
from immunize.report.series import sets_of
from immunize.study import Claim
from immunize.types import Arm, Check, Kind

HEIGHT, TOP, PLOT = 206.0, 42.0, 118.0
RATE = "learning_rate="
INSIDE = 18.0  # room for the markers of the first and the last rate
ASIDE: Mapping[Arm, float] = {Arm.CONTROL: -4.0, Arm.DEFENDED: 4.0}


def step_panels(claim: Claim) -> list[Panel]:
    """[] for an undefended model, which nothing is compared with."""
    if claim.is_control:
        return []
    kinds = list(dict.fromkeys(map(_without_rate, claim.cells)))
    return [
        _panel(claim, exposure, kind=kind)
        for kind in kinds
        for exposure in sets_of(claim, Kind.EXPOSURE)
        if any(_answer(run, exposure) for run in claim.runs)
    ]


def legend() -> Panel:
    """What the markers mean."""
    marks: list[Mark] = []
    left = 0.0
    for arm in Arm:
        marks += _marker(left + 6, 8, arm=arm, censored=False)
        marks.append(Words(x=left + 17, y=12, text=str(arm), size=11))
        left += 80
    marks += _marker(left + 6, 8, arm=Arm.DEFENDED, censored=True)
    marks.append(Words(x=left + 17, y=12, text="more than: limit never crossed", size=11))
    return Panel(title="Legend", width=left + 200, height=18, marks=marks)


def answer_of(checks: Sequence[Check], exposure: str) -> Check | None:
    """The check of a run that asks about one exposure: the first judge's, whose curves are drawn."""
    name = WITHIN_BUDGET if exposure == "seen" else f"generalization/{exposure}"
    return next((check for check in checks if check.name == name), None)


def _answer(run: Run, exposure: str) -> Check | None:
    check = answer_of(run.checks, exposure)
    return check if check is not None and check.steps_control is not None else None


def _without_rate(cell: str) -> str:
    return ", ".join(part for part in cell.split(", ") if not part.startswith(RATE))


def _panel(claim: Claim, exposure: str, *, kind: str) -> Panel:
    found = [
        (float(run.manifest["config"]["budget"]["learning_rate"]), check)
        for cell, runs in claim.cells.items()
        if _without_rate(cell) == kind
        for run in runs
        if (check := _answer(run, exposure)) is not None
    ]
    marks: list[Mark] = [Words(x=0, y=TEXT, text=f"attack: {exposure.replace('_', ' ')}", size=TEXT, bold=True)]
    if kind:
        marks.append(Words(x=0, y=TEXT + 15, text=shortened(kind), ink="muted"))
    rates = sorted({rate for rate, _ in found})
    last = max((steps for _, check in found for arm in Arm if (steps := _steps(check, arm)) is not None), default=1)
    plot = Axes(
        left=LEFT + INSIDE,
        top=TOP,
        width=WIDTH - LEFT - 2 * INSIDE,
        height=PLOT,
        x=(rates[0], rates[-1]) if rates else (1, 1),
        y=(0, last * 1.08),
        x_is_log=True,
    )
    ruled = replace(plot, left=LEFT, width=WIDTH - LEFT)
    marks += frame(ruled, x_ticks=(), y_ticks=whole_ticks(last), x_labels_at=0)
    marks += frame(plot, x_ticks=rates, y_ticks=(), x_labels_at=plot.bottom + 18)
    marks.append(Words(x=LEFT, y=plot.bottom + 32, text="learning rate", ink="muted"))
    for arm in Arm:
        marks += _arm(found, rates, arm=arm, plot=plot)
    title = f"Steps to the threshold against learning rate, {claim.name}, {exposure}{', ' * bool(kind)}{kind}"
    return Panel(title=title, width=WIDTH, height=HEIGHT, marks=marks)


def _arm(found: Sequence[tuple[float, Check]], rates: Sequence[float], *, arm: Arm, plot: Axes) -> list[Mark]:
    """A marker a seed, and a line through the medians."""
    marks: list[Mark] = []
    middles = []
    for rate in rates:
        values = [steps for at, check in found if at == rate and (steps := _steps(check, arm)) is not None]
        if values:
            middles.append((plot.across(rate) + ASIDE[arm], plot.down(median(values))))
    if len(middles) > 1:
        marks.append(Line(points=middles, ink=str(arm), width=1.2, dashes=DASHES[arm]))
    for rate, check in found:
        steps = _steps(check, arm)
        if steps is not None:
            x, y = plot.across(rate) + ASIDE[arm], plot.down(steps)
            marks += _marker(x, y, arm=arm, censored=arm in check.censored)
    return marks


def _steps(check: Check, arm: Arm) -> int | None:
    return check.steps_control if arm is Arm.CONTROL else check.steps_defended


def _marker(x: float, y: float, *, arm: Arm, censored: bool) -> list[Mark]:
    """A diamond for the control, a square for the defended model; an arrow up for `more than`."""
    if censored:
        shaft = Line(points=((x, y + 3), (x, y - 8)), ink=str(arm), width=1.6)
        return [shaft, Area(points=((x - 4, y - 6), (x, y - 12), (x + 4, y - 6)), ink=str(arm))]
    if arm is Arm.CONTROL:
        return [Area(points=((x - 4.2, y), (x, y - 4.2), (x + 4.2, y), (x, y + 4.2)), ink=str(arm))]
    return [Area(points=box(x - 3, y - 3, 6, 6), ink=str(arm))]
