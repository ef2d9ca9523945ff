"""What is verified or replayed: an archive read into a fresh temporary folder, or a folder as it lies."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from immunize.records import ERROR, PRIVATE
from immunize.sharing.archive import land
from immunize.sharing.inert import parse, plain
from immunize.sharing.members import FORMAT, INDEX, RECORDS, REPORT, RUN_ID, STUDY_NAME, Limits, is_allowed, run_of
from immunize.stages import address, hash_file

LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A study to be looked at: its files by path below `folder`, with the SHA-256 of each as found.

    `faults` are what disagrees with the index: hashes, and members that are missing.
    """

    folder: Path
    study: str
    digests: Mapping[str, str]
    faults: Sequence[str] = ()

    @property
    def run_ids(self) -> list[str]:
        """The runs that have a manifest."""
        return sorted(run for name in self.digests if (run := run_of(name)) and name == f"{run}/manifest.json")

    @cached_property
    def fingerprint(self) -> str:
        """One name for all records, whether they lie in an archive or in a folder."""
        kept = {name: digest for name, digest in self.digests.items() if run_of(name) and not name.endswith(PRIVATE)}
        return address(kept, digits=32)


@contextmanager
def opened(path: Path, *, limits: Limits = LIMITS) -> Iterator[Shared]:
    """Read an archive or a folder; raises ValueError where it is not one, or holds what no archive may hold."""
    if path.is_dir():
        yield _checked(_of_folder(path, limits=limits), strict=False)
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="immunize-share-") as temporary:
            folder = Path(temporary)
            study, digests = land(path, folder, limits=limits)
            if INDEX not in digests:
                raise ValueError(f"{plain(path)}: has no {INDEX}; immunize-share pack makes an archive")
            yield _checked(Shared(folder=folder, study=study, digests=digests), strict=True)
    else:
        raise ValueError(f"{plain(path)}: no such archive or folder")


def _of_folder(folder: Path, *, limits: Limits) -> Shared:
    """The files that an archive may hold; whatever else lies in a study's folder is not looked at."""
    name = folder.resolve().name
    if not STUDY_NAME.fullmatch(name):
        raise ValueError(f"{plain(folder)}: not a study's name; letters, digits, '.', '_' and '-' only")
    found: dict[str, str] = {}
    for path in _files(folder):
        below = path.relative_to(folder).as_posix()
        parent, _, last = below.rpartition("/")
        if last == "manifest.json" and "/" not in parent and parent not in ("", REPORT) and not run_of(below):
            raise ValueError(f"{plain(below)}: refused: a run's folder is named by ten hexadecimal digits")
        if not is_allowed(below):
            continue
        if path.is_symlink() or path.parent.is_symlink():
            raise ValueError(f"{plain(below)}: a symbolic link; records are plain files")
        if path.stat().st_size > limits.largest(below):
            raise ValueError(f"{plain(below)}: refused: more than {limits.largest(below)} bytes")
        found[below] = hash_file(path)
    return Shared(folder=folder, study=name, digests=found)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "wandb")
        yield from (Path(place) / name for name in sorted(names))
        linked = [name for name in folders if RUN_ID.fullmatch(name) and (Path(place) / name).is_symlink()]
        yield from (Path(place) / name / "manifest.json" for name in linked)


def _checked(shared: Shared, *, strict: bool) -> Shared:
    """Against the index. In an archive (`strict`) nothing may lie beside it; in a folder, a report of one's own may."""
    if not shared.run_ids:
        raise ValueError(f"{plain(shared.study)}: holds no run; a study is a folder like multirun/NAME")
    if INDEX not in shared.digests:
        return shared
    members = _index(shared.folder / INDEX, study=shared.study if strict else None)
    beside = sorted(set(shared.digests) - set(members) - {INDEX})
    if beside and strict:
        raise ValueError(f"{beside[0]}: refused: it is not in the index")
    faults = [f"{name}: not in the index" for name in beside if not name.startswith(f"{REPORT}/")]
    for name, digest in sorted(members.items()):
        if name not in shared.digests:
            faults.append(f"{plain(name)}: in the index, but missing")
        elif shared.digests[name] != digest:
            faults.append(f"{name}: its SHA-256 is not the one in the index")
    return Shared(folder=shared.folder, study=shared.study, digests=shared.digests, faults=faults)


def _index(path: Path, *, study: str | None) -> dict[str, str]:
    try:
        index: Any = parse(path.read_bytes())
        version, name, members = index["format"], index["study"], index["members"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{INDEX}: cannot be read ({plain(error)})") from error
    if version != FORMAT:
        raise ValueError(
            f"{INDEX}: format {plain(version, longest=20)}; this version of immunize reads format {FORMAT}"
        )
    if not isinstance(name, str) or not STUDY_NAME.fullmatch(name):
        raise ValueError(f"{INDEX}: study {plain(name, longest=60)}: letters, digits, '.', '_' and '-' only")
    if study not in (None, name):
        raise ValueError(f"{INDEX}: speaks of study {name}, and the members lie in {study}")
    if not isinstance(members, dict) or not all(isinstance(digest, str) for digest in members.values()):
        raise ValueError(f"{INDEX}: members must map names to SHA-256")
    return members


def left_behind(folder: Path) -> bool:
    """Whether a run neither finished nor failed: it is at work, or was interrupted."""
    return not (folder / "DONE").exists() and not (folder / ERROR).exists()


def records_of(folder: Path, *, samples: bool) -> list[str]:
    """The names of a finished run's files that are shared."""
    names = (*RECORDS, PRIVATE) if samples else RECORDS
    return [name for name in names if (folder / name).exists()]
