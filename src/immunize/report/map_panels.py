"""Tables whose cells are colored, as pictures: defenses against checks, attack cells against exposures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from immunize.report.conclusions import CONDITIONS, speaking
from immunize.report.drawing import Area, Line, Mark, Panel, Words, box
from immunize.types import StudyCheck

COLUMN, ROW, HEAD = 98.0, 26.0, 40.0
PER_LETTER = 6.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Square:
    """A cell's word and the ink that lies under it."""

    text: str
    ink: str


def verdict_map(verdicts: Mapping[str, Sequence[StudyCheck]]) -> Panel:
    """Every defense against every check: the verdict as color and as word."""
    answers = {name: {item.check.name: item.check for item in speaking(checks)} for name, checks in verdicts.items()}
    names = check_names(verdicts)
    rows = {
        name: [
            Square(text=str(found[check].verdict) + "*" * bool(found[check].flags), ink=str(found[check].verdict))
            if check in found
            else Square(text="\N{EN DASH}", ink="paper")
            for check in names
        ]
        for name, found in answers.items()
    }
    return _table("Verdicts, every defense against every check", names, rows)


def check_names(verdicts: Mapping[str, Sequence[StudyCheck]]) -> list[str]:
    """Every check that any defense was asked, in the order of the conditions."""
    names = dict.fromkeys(item.check.name for checks in verdicts.values() for item in checks)
    order = {
        name: CONDITIONS.index(condition) if (condition := name.partition("/")[0]) in CONDITIONS else len(CONDITIONS)
        for name in names
    }
    return sorted(names, key=lambda name: order[name])


def degree_map(title: str, exposures: Sequence[str], degrees: Mapping[str, Sequence[float | None]]) -> Panel:
    """Degree of resistance, attack cells against exposures."""
    rows = {
        cell: [
            Square(text="\N{EN DASH}" if value is None else f"{value:.2f}", ink=f"degree-{degree_class(value)}")
            for value in values
        ]
        for cell, values in degrees.items()
    }
    return _table(title, [f"degree/{name}" for name in exposures], rows)


def degree_class(value: float | None) -> int:
    """From 1 (no better than the control) to 5 (nearly full resistance); 0 where there is none."""
    return 0 if value is None else 1 + min(4, max(0, int(value * 5)))


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Square]]) -> Panel:
    """Column heads are `group/name`, groups with a rule above their columns."""
    left = max([90.0, *(PER_LETTER * len(name) + 12 for name in rows)])
    marks: list[Mark] = []
    before = ""
    for index, column in enumerate(columns):
        group, _, name = column.partition("/")
        x = left + index * COLUMN
        if group != before:
            marks.append(Words(x=x + 2, y=14, text=group, size=11, bold=True))
            before = group
        marks.append(Line(points=((x + 1, 20), (x + COLUMN - 1, 20)), ink="rule"))
        marks.append(Words(x=x + 2, y=34, text=name.replace("_", " "), ink="muted"))
    for down, (name, squares) in enumerate(rows.items()):
        y = HEAD + down * ROW
        marks.append(Words(x=left - 10, y=y + 17, text=name, anchor="end", size=11))
        for index, square in enumerate(squares):
            x = left + index * COLUMN
            outline = "muted" if square.ink == "undetermined" else None
            marks.append(Area(points=box(x + 1, y + 1, COLUMN - 3, ROW - 3), ink=square.ink, outline=outline))
            marks.append(
                Words(x=x + COLUMN / 2, y=y + 17, text=square.text, ink=f"on-{square.ink}", anchor="middle", size=11)
            )
    return Panel(title=title, width=left + COLUMN * len(columns) + 8, height=HEAD + ROW * len(rows) + 6, marks=marks)
