"""A small vocabulary for pictures: marks with inks, on panels.

A grid has hundreds of panels, which a general plotting library takes a minute over. Marks are placed once, in pixels
from the top left, and written twice: as SVG (whose inks follow the page's colors, also in the dark) and as PNG.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Points = Sequence[tuple[float, float]]
SMALL, TEXT = 10.0, 12.0
GAP = 16.0
LONGEST = 54  # letters of the small size on a panel


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A polyline."""

    points: Points
    ink: str
    width: float = 1.0
    dashes: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """A filled polygon; an `outline` is dashed, for what must not look decided."""

    points: Points
    ink: str
    opacity: float = 1.0
    outline: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """One line of text; `y` is its baseline."""

    x: float
    y: float
    text: str
    ink: str = "ink"
    anchor: str = "start"
    size: float = SMALL
    bold: bool = False


Mark = Line | Area | Words


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture; `title` is what it shows, in words, for those who cannot see it."""

    title: str
    width: float
    height: float
    marks: Sequence[Mark]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """From data to pixels; `x_is_log` for learning rates."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float] = (0.0, 1.0)
    x_is_log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies; values outside are drawn at the edge."""
        return self.across(x), self.down(y)

    def across(self, x: float) -> float:
        low, high = self.x
        if self.x_is_log:
            x, low, high = math.log(x), math.log(low), math.log(high)
        share = 0.5 if high == low else (x - low) / (high - low)
        return self.left + self.width * min(1.0, max(0.0, share))

    def down(self, y: float) -> float:
        low, high = self.y
        share = 0.5 if high == low else (y - low) / (high - low)
        return self.top + self.height * (1 - min(1.0, max(0.0, share)))

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def right(self) -> float:
        return self.left + self.width


def frame(axes: Axes, *, x_ticks: Sequence[float], y_ticks: Sequence[float], x_labels_at: float) -> list[Mark]:
    """Rules at the ticks of y, labels at both axes."""
    marks: list[Mark] = []
    for value in y_ticks:
        y = axes.down(value)
        marks.append(Line(points=((axes.left, y), (axes.right, y)), ink="rule"))
        marks.append(Words(x=axes.left - 5, y=y + 3.5, text=f"{value:g}", ink="muted", anchor="end"))
    marks += [
        Words(x=axes.across(value), y=x_labels_at, text=f"{value:g}", ink="muted", anchor="middle") for value in x_ticks
    ]
    return marks


def band(xs: Sequence[float], low: Sequence[float], high: Sequence[float], *, axes: Axes, ink: str) -> Area:
    """What lies between two curves."""
    upper = [axes.at(x, y) for x, y in zip(xs, high, strict=True)]
    lower = [axes.at(x, y) for x, y in zip(xs, low, strict=True)]
    return Area(points=upper + lower[::-1], ink=ink, opacity=0.16)


def box(x: float, y: float, width: float, height: float) -> Points:
    """The corners of a rectangle."""
    return ((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def shortened(text: str) -> str:
    """What fits on a line of a panel; the page has it in full beside."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def whole_ticks(last: float) -> list[float]:
    """Start, middle and end of an axis of steps."""
    middle = last // 2
    return [0, last] if middle in (0, last) else [0, middle, last]


def moved(mark: Mark, right: float, down: float) -> Mark:
    """The same mark somewhere else."""
    if isinstance(mark, Words):
        return replace(mark, x=mark.x + right, y=mark.y + down)
    return replace(mark, points=[(x + right, y + down) for x, y in mark.points])


def composed(title: str, rows: Sequence[Sequence[Panel]]) -> Panel:
    """Panels in rows, as one picture with its title above."""
    marks: list[Mark] = [Words(x=GAP, y=GAP + TEXT, text=title, size=TEXT + 1, bold=True)]
    top, widest = GAP * 2 + TEXT, 320.0
    for row in rows:
        left = GAP
        for panel in row:
            marks += [moved(mark, left, top) for mark in panel.marks]
            left += panel.width + GAP
        widest = max(widest, left)
        top += max((panel.height for panel in row), default=0.0) + GAP
    return Panel(title=title, width=widest, height=top, marks=marks)
