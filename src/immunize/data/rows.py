"""Rows of a data set, from local files or from the Hugging Face hub at a commit; what is malformed is named by line."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from immunize.data import formats
from immunize.data.formats import SUFFIXES, Entry
from immunize.data.hub import check_commit, snapshot
from immunize.stages import address, hash_file, hash_folder

MOST_SHOWN = 5
Found = TypeVar("Found")


class MalformedError(ValueError):
    """A row that is not what its data set should hold; the message goes after "line 3 "."""


class LeftOutError(Exception):
    """A sound row that is not wanted; the message is the reason under which it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: `number` counts from 0, `place` is its line for people, `problem` why it could not be read."""

    number: int
    place: str
    values: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What became of the rows of one source; recorded in the manifest of a run. No text, and no path.

    moved: rows that were counted under another category than their own, since all rows of a prompt belong together.
    """

    source: str
    rows: int
    kept: int
    malformed: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    moved: int = 0

    def line(self) -> str | None:
        """What was left out or moved, in words; None where every row was taken as it is."""
        parts = [f"{count} left out ({reason})" for reason, count in self.left_out.items()]
        if self.malformed:
            parts.append(f"{len(self.malformed)} malformed and left out ({_some(self.malformed)})")
        if self.moved:
            parts.append(f"{self.moved} counted under the commonest category of their prompt")
        return f"{self.kept} of {self.rows} rows of {self.source}; {', '.join(parts)}" if parts else None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where rows lie: `path` (a file, or a folder laid out like a hub repository), or `id` at `commit` on the hub.

    subset, split: which part of a repository or folder. files: instead of these, files of it that are read one after
    the other (`part_*.csv` for all that match); each row then has a column `file`, its file's name without suffix.
    columns: names for CSV files without a header. malformed_share: the share of rows that may be malformed and are left
    out; above it, none is read. `path` wins where both are given, so that a copy stands in for the hub.
    """

    path: str | None = None
    id: str | None = None
    commit: str | None = None
    subset: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    malformed_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.malformed_share < 1:
            raise ValueError(f"malformed_share={self.malformed_share}: must lie in [0, 1)")
        for name in self.files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"files={name}: must lie below the folder or repository")
        if self.path is not None:
            check_path(self.path)
        elif self.id is None:
            raise ValueError("path=null: give a file or folder, or the id and the commit of a data set of the hub")
        else:
            check_commit(self.id, self.commit)

    @property
    def name(self) -> str:
        """The source without its place on this machine."""
        return Path(self.path).name if self.path is not None else f"{self.id}@{str(self.commit)[:7]}"

    @property
    def shown(self) -> str:
        """The source in an error message."""
        return f"path={self.path}" if self.path is not None else f"{self.id} at {self.commit}"

    def digest(self) -> str:
        """A hash of the content, to tell a changed file from the one that was read before."""
        if self.path is None:
            return str(self.commit)
        path = Path(self.path)
        return hash_file(path) if path.is_file() else address(hash_folder(path))

    def read(self, needed: Collection[str], *, hint: str = "") -> list[Row]:
        """All rows, malformed ones too. Raises ValueError where a needed column is in no row, or there is no row."""
        rows = _read(self)
        if not rows:
            raise ValueError(f"{self.shown}: holds no rows")
        known = list(dict.fromkeys(name for row in rows for name in row.values))
        missing = sorted({name.partition(".")[0] for name in needed} - set(known))
        if missing and known:
            raise ValueError(
                f"{self.shown}: has no column {', '.join(missing)}; it has {', '.join(known)}. {hint}".strip()
            )
        return rows

    def convert(self, rows: Sequence[Row], make: Callable[[Row], Found]) -> tuple[list[Found], Reading]:
        """What `make` makes of each row. Malformed rows are left out, and refused above `malformed_share`."""
        found: list[Found] = []
        malformed: dict[str, str] = {}
        left_out: Counter[str] = Counter()
        for row in rows:
            try:
                if row.problem is not None:
                    raise MalformedError(row.problem)
                found.append(make(row))
            except MalformedError as error:
                malformed[row.place] = str(error)
            except LeftOutError as error:
                left_out[str(error)] += 1
        if len(malformed) > self.malformed_share * len(rows):
            raise ValueError(
                f"{self.shown}: {len(malformed)} of {len(rows)} rows are malformed, more than malformed_share="
                f"{self.malformed_share:g} allows: {_some([f'{place} {why}' for place, why in malformed.items()])}"
            )
        if not found:
            raise ValueError(f"{self.shown}: of {len(rows)} rows none is left ({', '.join(left_out)})")
        reading = Reading(
            source=self.name, rows=len(rows), kept=len(found), malformed=tuple(malformed), left_out=dict(left_out)
        )
        return found, reading


def check_path(path: str) -> None:
    """Refuse what cannot be read, before anything is read."""
    if not path.strip() or not Path(path).exists():
        raise ValueError(f"path={path}: no such file")
    if Path(path).is_file() and Path(path).suffix not in SUFFIXES:
        raise ValueError(f"path={path}: must end in {', '.join(SUFFIXES)}")


def value(row: Row, column: str) -> Any:
    """The value of a column; `prompt.text` is the entry `text` of the column `prompt`."""
    found: Any = row.values
    for name in column.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def text(row: Row, column: str) -> str:
    """The text of a column; MalformedError where there is none."""
    found = value(row, column)
    if not isinstance(found, str) or not found.strip():
        raise MalformedError(f"has no text in column {column}")
    return whole(found, f"column {column}")


def whole(found: str, where: str) -> str:
    """A text that can be written to a file; JSON may hold one that cannot (half of a surrogate pair)."""
    try:
        found.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"has half a character in {where}") from None
    return found


def flag(row: Row, column: str) -> bool:
    """A truth value, also as 0 and 1 or as CSV writes it."""
    found = value(row, column)
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(found).strip().lower() not in known:
        raise MalformedError(f"has neither true nor false in column {column}")
    return known[str(found).strip().lower()]


def _read(source: Rows) -> list[Row]:
    if source.path is not None:
        place = Path(source.path)
    else:
        place = snapshot(str(source.id), str(source.commit), files=source.files)
    try:
        if source.files and place.is_dir():
            found: list[Entry] = [
                (f"{path.name} {where}", {**values, "file": path.stem}, problem)
                for path in formats.matching(place, source.files)
                for where, values, problem in formats.entries(path, columns=source.columns)
            ]
        elif place.is_file():
            found = list(formats.entries(place, columns=source.columns))
        elif source.columns:
            raise ValueError(f"columns={list(source.columns)}: say which CSV files, too, such as files=['*.csv']")
        else:
            found = list(formats.table(str(place), name=source.subset, split=source.split))
    except ValueError as error:
        raise ValueError(f"{source.shown}: {error}") from error
    return [
        Row(number=number, place=where, values=values, problem=problem)
        for number, (where, values, problem) in enumerate(found)
    ]


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + rest
