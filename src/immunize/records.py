"""A run's directory: claimed, filled, finished; and read back.

Everything but the private samples is free of generated text, and enough to recompute every check. Times and hosts
stand in the manifest only, so that the other files of two equal runs are byte-equal. `DONE` is written last.
"""

import gzip
import json
import math
import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from immunize.stages import ELSEWHERE, damage, held, write_durably
from immunize.types import Arm, Check, EvaluationSet, Half, Kind, Outcome, Row, Score, Verdict

ERROR = "ERROR.txt"
PRIVATE = "samples.jsonl.gz"
FIGURE = "figure.png"


class RunFailedError(Exception):
    """A run was started and failed; its directory holds the traceback."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, read back from its directory."""

    path: Path
    manifest: Mapping[str, Any]
    sets: Sequence[EvaluationSet]
    rows: Sequence[Row]
    scores: Sequence[Score]
    checks: Sequence[Check]

    @property
    def id(self) -> str:
        return self.path.name


def is_finished(folder: Path) -> bool:
    return (folder / "DONE").exists()


def flaw(folder: Path) -> str | None:
    """What is wrong with a finished run's files, in words; it may be passed on without private samples and picture."""
    return damage(folder, may_lack=[PRIVATE, FIGURE])


@contextmanager
def claim(folder: Path, *, announce: Callable[[str], None], wait: bool = True) -> Iterator[None]:
    """Hold the run's directory; where another process is at work on it, wait, or raise BusyError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"runtime.root: cannot write to {folder} ({error.strerror or error}); choose a folder that you may write to"
        ) from error
    with held(folder, wait=wait, announce=lambda: announce(f"run {folder.name}: {ELSEWHERE}, waiting")):
        yield


def start(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a run that is about to start; what a failed try left is removed."""
    for name in (ERROR, "DONE"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    _write_json(folder / "manifest.json", {**manifest, "status": "running"})


def fail(folder: Path, error: BaseException, *, manifest: Mapping[str, Any]) -> None:
    """Leave the traceback where the report will find it."""
    _write_json(folder / "manifest.json", {**manifest, "status": "failed"})
    text = "".join(traceback.format_exception(error)).replace(str(Path.home()), "~")
    write_durably(folder / ERROR, text.encode())


def finish(
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    sets: Sequence[EvaluationSet],
    rows: Sequence[Row],
    scores: Sequence[Score],
    checks: Sequence[Check],
    samples: Sequence[dict[str, Any]],
) -> None:
    """Write all records; the caller adds what else belongs to the run and then seals the folder."""
    _write_lines(folder / "items.jsonl", map(asdict, sets))
    _write_lines(folder / "curve.jsonl", map(asdict, rows))
    _write_lines(folder / "scores.jsonl", map(asdict, scores))
    _write_json(folder / "checks.json", [asdict(check) for check in checks])
    write_private_lines(folder / PRIVATE, samples)
    _write_json(folder / "manifest.json", {**manifest, "status": "finished"})


def read(folder: Path, *, checked: bool = False) -> Run:
    """Read a finished run back; raises ValueError when a file is damaged, unless the caller has `checked` that."""
    problem = None if checked else flaw(folder)
    if problem:
        raise ValueError(f"run {folder.name}: {problem}; remove the folder and run it again")
    return Run(
        path=folder,
        manifest=json.loads((folder / "manifest.json").read_text()),
        sets=[evaluation_set_of(line) for line in _lines(folder / "items.jsonl")],
        rows=[_row(line) for line in _lines(folder / "curve.jsonl")],
        scores=[score_of(line) for line in _lines(folder / "scores.jsonl")],
        checks=[_check(entry) for entry in json.loads((folder / "checks.json").read_text())],
    )


def evaluation_set_of(line: dict[str, Any]) -> EvaluationSet:
    """An evaluation set from a line of items.jsonl."""
    return EvaluationSet(
        name=line["name"],
        kind=Kind(line["kind"]),
        ids=tuple(line["ids"]),
        objects=tuple(line["objects"]),
        halves=tuple(map(Half, line["halves"])),
        chance=line["chance"],
        marks=tuple(line["marks"]),
    )


def _row(line: dict[str, Any]) -> Row:
    return Row(**{**line, "arm": Arm(line["arm"]), "value": _number(line["value"])})


def score_of(line: Mapping[str, Any]) -> Score:
    """One line of scores.jsonl."""
    changed = {
        "arm": Arm(line["arm"]),
        "scores": tuple(map(_number, line["scores"]) if None in line["scores"] else line["scores"]),
        "outcomes": tuple(map(_outcome, line["outcomes"])),
    }
    return Score(**{**line, **changed})


@cache
def _outcome(value: str | None) -> Outcome | None:
    """Remembered, because a study has a million of them."""
    return None if value is None else Outcome(value)


def _check(entry: dict[str, Any]) -> Check:
    changed = {
        "verdict": Verdict(entry["verdict"]),
        "censored": tuple(map(Arm, entry["censored"])),
        "flags": tuple(entry["flags"]),
    }
    return Check(**{**entry, **changed})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is missing is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_private_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Compressed JSON lines without a time stamp, so that equal rows give equal bytes; for generated text."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_durably(path, gzip.compress(text.encode(), mtime=0))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines, in which null stands for what is missing."""
    return "".join(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_durably(path, to_lines(rows).encode())


def _write_json(path: Path, value: Any) -> None:
    write_durably(path, (json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n").encode())
