"""One archive of a study: records of every run, the lock they were made under, the report. No text, no weights unless
asked for, and nothing of the machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import immunize
from immunize.judgement import FOLDER as JUDGEMENTS
from immunize.records import flaw
from immunize.sharing.archive import write
from immunize.sharing.inert import parse
from immunize.sharing.members import (
    FORMAT,
    INDEX,
    LOCK,
    OF_A_FAILED_RUN,
    REPORT,
    RUN_ID,
    STAGES,
    STUDY_NAME,
    Limits,
    fault,
    is_allowed,
    is_weights,
)
from immunize.sharing.privacy import refuse_private
from immunize.sharing.schema import is_failed, read_manifest
from immunize.sharing.source import left_behind, records_of
from immunize.stages import damage, hash_file


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An archive that was written; `left_out` says what was not packed, and why."""

    path: Path
    runs: int
    members: int
    size: int
    left_out: Sequence[str]


def pack(study: Path, *, output: Path | None = None, weights: bool = False, samples: bool = False) -> Packed:
    """Write `output` (STUDY.tar.gz here, if not given) and return what became of it.

    Raises ValueError for a damaged run, a link among the records, an output that exists, and for anything private in
    any file that is read as text.
    """
    study = study.resolve()
    output = output or Path(f"{study.name}.tar.gz")
    if not study.is_dir():
        raise ValueError(f"{study.name}: no such study; it is a folder like multirun/NAME")
    if not STUDY_NAME.fullmatch(study.name):
        raise ValueError(f"{study.name}: not a study's name; letters, digits, '.', '_' and '-' only")
    if output.exists():
        raise ValueError(f"{output}: exists already; nothing is overwritten, choose another --output")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder")
    members, manifests, left_out = _records(study, samples=samples)
    members |= _report(study, left_out) | _lock(study, manifests, left_out)
    judged = sorted(path.name for path in (study / JUDGEMENTS).glob("*.jsonl"))
    left_out += [f"{JUDGEMENTS}/{name}: what a judge said later is no record of a run" for name in judged]
    if weights:
        members |= _weights(study, manifests)
    for name, path in members.items():
        _refuse(study, name, path)
    index = {"format": FORMAT, "study": study.name, "members": {n: hash_file(p) for n, p in sorted(members.items())}}
    content = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
    write(output, {f"{study.name}/{name}": path for name, path in members.items()} | {f"{study.name}/{INDEX}": content})
    return Packed(
        path=output, runs=len(manifests), members=len(members) + 1, size=output.stat().st_size, left_out=left_out
    )


def _records(study: Path, *, samples: bool) -> tuple[dict[str, Path], dict[str, dict[str, Any]], list[str]]:
    members: dict[str, Path] = {}
    manifests: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for folder in sorted(path for path in study.iterdir() if RUN_ID.fullmatch(path.name) and path.is_dir()):
        if left_behind(folder):
            left_out.append(f"run {folder.name}: still at work, or interrupted")
            continue
        problem = None if is_failed(folder) else flaw(folder)
        if problem:
            raise ValueError(f"run {folder.name}: {problem}; run it again, or remove its folder")
        try:
            manifests[folder.name] = read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"run {folder.name}: {error}; run it again, or remove its folder") from error
        names = OF_A_FAILED_RUN if is_failed(folder) else records_of(folder, samples=samples)
        members |= {f"{folder.name}/{name}": folder / name for name in names}
    if not manifests:
        raise ValueError(f"{study.name}: holds no finished and no failed run; a study is a folder like multirun/NAME")
    return members, manifests, left_out


def _report(study: Path, left_out: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted((study / REPORT).rglob("*")):
        name = path.relative_to(study).as_posix()
        if path.is_file() and is_allowed(name):
            found[name] = path
        elif path.is_file():
            left_out.append(f"{name}: no file of a report")
    return found


def _lock(study: Path, manifests: dict[str, dict[str, Any]], left_out: list[str]) -> dict[str, Path]:
    """The lock file under which the runs were made, where it is at hand and unchanged."""
    wanted = {manifest["code"]["lock"] for manifest in manifests.values()} - {None}
    for place in (study, Path(immunize.__file__).parents[2]):
        if (place / LOCK).is_file() and hash_file(place / LOCK) in wanted:
            return {LOCK: place / LOCK}
    if wanted:
        left_out.append(f"{LOCK}: not the one that the runs were made under")
    return {}


def _weights(study: Path, manifests: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """The prepare stages that the finished runs name."""
    finished = [manifest for manifest in manifests.values() if manifest["status"] == "finished"]
    stages = {stage["id"] for item in finished for stage in item.get("stages", []) if stage["kind"] == "prepare"}
    found: dict[str, Path] = {}
    for stage in sorted(stages):
        folder = study.parent / ".stages" / "prepare" / stage
        problem = damage(folder)
        if problem:
            raise ValueError(f"stage prepare/{stage}: {problem}; its weights cannot be packed, leave --weights out")
        for name in ["DONE", *parse((folder / "DONE").read_bytes())]:
            found[f"{STAGES}/{stage}/{name}"] = folder / name
    return found


def _refuse(study: Path, name: str, path: Path) -> None:
    wrong = fault(f"{study.name}/{name}")
    if wrong:
        raise ValueError(f"{name}: cannot be packed: {wrong}")
    if path.is_symlink() or path.parent.is_symlink():
        raise ValueError(f"{name}: a symbolic link; records are plain files")
    if path.stat().st_size > (most := Limits().largest(name)):
        raise ValueError(f"{name}: cannot be packed: larger than the {most} bytes that are read from an archive")
    if not is_weights(name):
        refuse_private(name, path.read_bytes())
