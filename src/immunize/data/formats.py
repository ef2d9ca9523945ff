"""Files of rows (JSON, JSONL, CSV, Parquet): where each row stands, and what is wrong with one that cannot be read."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
Entry = tuple[str, Mapping[str, Any], str | None]  # where it stands, its values, what is wrong with it


def matching(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a folder by names or patterns. Raises ValueError for one that is not there."""
    found = [(name, path) for name in names for path in sorted(folder.glob(name))]
    missing = set(names) - {name for name, _ in found}
    if missing:
        raise ValueError(f"has no file {', '.join(sorted(missing))}")
    return [path for _, path in found]


def entries(path: Path, *, columns: Sequence[str]) -> Iterator[Entry]:
    """The rows of one file; `columns` are the names of a CSV file without a header. Raises ValueError, unread."""
    if columns and path.suffix != ".csv":
        raise ValueError(f"columns={list(columns)}: {path.name} names its columns itself; only CSV files may not")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".csv":
            yield from _csv(path, columns)
        else:
            yield from _json(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error


def table(loader: str, **place: Any) -> Iterator[Entry]:
    """Through the library `datasets`: folders laid out like a repository of the hub."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    # A cache of its own: the library's fingerprints miss a change of content under an old time stamp.
    with tempfile.TemporaryDirectory() as cache:
        try:
            found = load_dataset(loader, cache_dir=cache, keep_in_memory=True, **place)
        except (DatasetsError, ValueError, OSError) as error:
            raise ValueError(f"cannot be read ({str(error.__cause__ or error).splitlines()[0]})") from error
        for number, entry in enumerate(found.to_list(), start=1):
            yield f"row {number}", entry, None


def _json(path: Path) -> Iterator[Entry]:
    """A list of objects, a table by columns (as pandas writes it), or one object a line."""
    content = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(content) if path.suffix == ".json" else None
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, Mapping) and whole and all(isinstance(column, Mapping | list) for column in whole.values()):
        columns = [column.values() if isinstance(column, Mapping) else column for column in whole.values()]
        if len({len(column) for column in columns}) == 1:
            whole = [dict(zip(whole, entries, strict=True)) for entries in zip(*columns, strict=True)]
    if isinstance(whole, list):
        for number, entry in enumerate(whole, start=1):
            yield _entry(f"row {number}", entry)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield _entry(f"line {number}", json.loads(line))
            except (ValueError, RecursionError):
                yield f"line {number}", {}, "is no JSON"


def _entry(where: str, entry: Any) -> Entry:
    return (where, entry, None) if isinstance(entry, Mapping) else (where, {}, "is no JSON object")


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle, fieldnames=list(columns) or None, strict=True)
        names = list(reader.fieldnames or ())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"has several columns {', '.join(twice)}")
        while True:
            before = reader.reader.line_num
            try:
                entry = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error):  # all lines from here on are one field, and would count as one row
                    where = f"the row that starts after line {before}"
                    raise ValueError(f"a quotation mark of {where} is never closed") from error
                yield f"line {reader.reader.line_num}", {}, f"is no CSV ({error})"
                continue
            if entry is None:
                return
            problem = "has more fields than the header" if None in entry else None
            if None in entry.values():
                problem = "has fewer fields than the header"
            yield f"line {reader.line_num}", {key: item for key, item in entry.items() if key is not None}, problem


def _parquet(path: Path) -> Iterator[Entry]:
    from pyarrow import ArrowInvalid, parquet

    try:
        found = parquet.ParquetFile(path).read().to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    for number, entry in enumerate(found, start=1):
        yield f"row {number}", entry, None
