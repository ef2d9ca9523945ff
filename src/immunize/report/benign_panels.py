"""What a defense does to a model that nobody attacks: benign training, and benign skill before any tuning."""

from collections.abc import Sequence

from immunize.report.conclusions import condition_of, speaking
from immunize.report.drawing import TEXT, Area, Axes, Line, Mark, Panel, Words, band, box, frame, whole_ticks
from immunize.report.harm_panels import DASHES, IN_FRONT, LEFT, WIDTH
from immunize.report.numbers import interval, typeset
from immunize.report.series import Curves, average, one_a_seed, sets_of
from immunize.study import Claim
from immunize.types import Kind, StudyCheck

HEIGHT, TOP, PLOT = 176.0, 30.0, 108.0
ROW = 30.0


def training_panels(claim: Claim, curves: Curves) -> list[Panel]:
    """The task's score over benign training steps; the mean of the seeds, and what lies between their extremes."""
    runs = one_a_seed(claim.runs)
    panels = []
    for task in sets_of(claim, Kind.TRAINABILITY):
        arms = {arm: curves.of(runs, tuned_on=task, metric="score", arm=arm) for arm in IN_FRONT}
        last = max((curve.steps[-1] for found in arms.values() for curve in found), default=1)
        axes = Axes(left=LEFT, top=TOP, width=WIDTH - LEFT - 8, height=PLOT, x=(0, last))
        marks: list[Mark] = [Words(x=0, y=TEXT, text=task.replace("_", " "), size=TEXT, bold=True)]
        marks += frame(axes, x_ticks=whole_ticks(last), y_ticks=(0, 0.5, 1), x_labels_at=axes.bottom + 14)
        marks.append(Words(x=axes.left, y=axes.bottom + 27, text="training steps", ink="muted"))
        ends = []
        for arm, found in arms.items():
            if not found:
                continue
            middle = average(found)
            values = [
                [curve.values[curve.steps.index(step)] for curve in found if step in curve.steps]
                for step in middle.steps
            ]
            xs = [float(step) for step in middle.steps]
            marks.append(band(xs, list(map(min, values)), list(map(max, values)), axes=axes, ink=str(arm)))
            points = [axes.at(x, y) for x, y in zip(xs, middle.values, strict=True)]
            marks.append(Line(points=points, ink=str(arm), width=1.8, dashes=DASHES[arm]))
            ends.append(f"{arm} {middle.values[-1]:.2f}")
        title = f"Benign training, {claim.name}, {task}; score at the last step: {', '.join(ends)}"
        panels.append(Panel(title=title, width=WIDTH, height=HEIGHT, marks=marks))
    return panels


def stability_panel(claim: Claim, checks: Sequence[StudyCheck]) -> Panel | None:
    """A bar for each task: the change from control to defended, its interval and its limit; None without any."""
    shown = [
        item for item in speaking(checks) if condition_of(item.check) == "stability" and item.check.estimate is not None
    ]
    if not shown:
        return None
    values = [
        value
        for item in shown
        for value in (item.check.low, item.check.high, item.check.threshold, 0.0)
        if value is not None
    ]
    reach = max(0.15, *(abs(value) for value in values)) * 1.1
    width, top = 560.0, 8.0
    axes = Axes(left=130, top=top, width=260, height=ROW * len(shown), x=(-reach, reach))
    marks: list[Mark] = []
    zero = axes.across(0)
    marks.append(Line(points=((zero, top), (zero, axes.bottom)), ink="muted"))
    for index, item in enumerate(shown):
        marks += _bar(item, axes, middle=top + ROW * (index + 0.5))
    for value in (-reach / 1.1, 0.0, reach / 1.1):
        at = axes.across(value)
        marks.append(Words(x=at, y=axes.bottom + 14, text=typeset(f"{value:.2f}"), ink="muted", anchor="middle"))
    change = "change of the score (over-refusal: of the refusal rate), defended less control"
    marks.append(Words(x=130, y=axes.bottom + 28, text=change, ink="muted"))
    title = f"Stability, {claim.name}: " + "; ".join(f"{item.check.name} {interval(item.check)}" for item in shown)
    return Panel(title=title, width=width, height=axes.bottom + 36, marks=marks)


def _bar(item: StudyCheck, axes: Axes, *, middle: float) -> list[Mark]:
    check = item.check
    estimate = check.estimate or 0.0
    zero, end = axes.across(0), axes.across(estimate)
    marks: list[Mark] = [
        Words(x=122, y=middle + 4, text=check.name.partition("/")[2].replace("_", " "), anchor="end", size=11),
        Area(points=box(min(zero, end), middle - 6, max(abs(end - zero), 1), 12), ink="defended", opacity=0.45),
        Words(x=axes.right + 12, y=middle + 4, text=typeset(interval(check)), size=11),
    ]
    if check.low is not None and check.high is not None:
        low, high = axes.across(check.low), axes.across(check.high)
        marks.append(Line(points=((low, middle), (high, middle)), ink="defended", width=1.6))
        for x in (low, high):
            marks.append(Line(points=((x, middle - 4), (x, middle + 4)), ink="defended", width=1.6))
    if check.threshold is not None:
        at = axes.across(check.threshold)
        marks.append(Line(points=((at, middle - 12), (at, middle + 12)), ink="limit", dashes=(1.5, 2.5), width=1.2))
    return marks
