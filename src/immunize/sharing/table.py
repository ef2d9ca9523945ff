"""The report's table of verdicts, held against the verdicts that the scores give."""

import csv
from collections.abc import Sequence
from pathlib import Path

from immunize.sharing.inert import plain
from immunize.types import Check

NEEDED = ("claim", "check", "verdict")
NAMES = {"defense": "claim"}  # what the report calls it
TEXT = ("judge",)
NUMBERS = ("estimate", "low", "high", "threshold", "degree")
Line = tuple[str, ...]


def table_differences(path: Path, answers: Sequence[tuple[str, Check]]) -> list[str]:
    """Lines of the table that do not follow, and lines that are missing, by the columns that it has of those known.

    Numbers are compared by six digits; reasons and runs are not compared.
    """
    try:
        columns, recorded = _read(path)
    except (ValueError, csv.Error) as error:
        return [f"{path.name}: cannot be read ({plain(error)})"]
    computed = [_line(claim, check, columns) for claim, check in answers]
    found = [("the table says", line) for line in sorted(set(recorded) - set(computed))]
    found += [("the scores say", line) for line in sorted(set(computed) - set(recorded))]
    if not found and len(recorded) != len(computed):
        found = [("the table says something twice or not as often as", ("the scores do",))]
    return [plain(f"{who} {' '.join(word for word in line if word)}") for who, line in found]


def _read(path: Path) -> tuple[list[str], list[Line]]:
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle, strict=True))
    head = [name.strip().lower() for name in rows[0]] if rows else []
    names = [NAMES.get(name, name) for name in head]
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise ValueError(f"has no column {', '.join(missing)}")
    if any(len(row) != len(names) for row in rows):
        raise ValueError("has a line with another number of columns")
    columns = [name for name in (*NEEDED, *TEXT, *NUMBERS) if name in names]
    places = [(name, names.index(name)) for name in columns]
    return columns, [tuple(_cell(name, row[place]) for name, place in places) for row in rows[1:]]


def _cell(name: str, text: str) -> str:
    """A leading apostrophe keeps spreadsheets from taking text for a formula, and is no part of it."""
    return _number(float(text)) if name in NUMBERS and text else text.removeprefix("'")


def _line(claim: str, check: Check, columns: Sequence[str]) -> Line:
    values: dict[str, str] = {"claim": claim, "check": check.name, "verdict": str(check.verdict), "judge": check.judge}
    for name in NUMBERS:
        value = getattr(check, name)
        values[name] = "" if value is None else _number(value)
    return tuple(values[name].removeprefix("'") for name in columns)


def _number(value: float) -> str:
    return f"{value:.6g}"
