"""Archives for the tests of sharing: read, changed, written again, and given to the command."""

import gzip
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from immunize.sharing.archive import write
from immunize.sharing.members import INDEX
from immunize.stages import seal


def share(*arguments: object) -> int:
    """The exit code of `immunize-share ...`."""
    from immunize.cli.share import main

    before = sys.argv
    os.environ.pop("HYDRA_FULL_ERROR", None)  # the command sets it, for its own process
    sys.argv = ["immunize-share", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        sys.argv = before
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def members(archive: Path) -> dict[str, bytes]:
    """Every member with its content."""
    with tarfile.open(archive) as tar:
        return {item.name: tar.extractfile(item).read() for item in tar}  # type: ignore[union-attr]


def rewritten(archive: Path, path: Path, change: Callable[[dict[str, bytes]], None], *, index: bool = True) -> Path:
    """The archive with its members changed, under an index of what they are now (or the old one)."""
    import hashlib

    found = members(archive)
    change(found)
    (place,) = [name for name in found if name.endswith(INDEX)]
    if index:
        study = place.partition("/")[0]
        hashes = {
            name.partition("/")[2]: hashlib.sha256(content).hexdigest()
            for name, content in found.items()
            if name != place
        }
        found[place] = json.dumps({"format": 1, "study": study, "members": hashes}).encode()
    write(path, found)
    return path


def raw_archive(path: Path, infos: list[tuple[tarfile.TarInfo, bytes]], *, form: int = tarfile.GNU_FORMAT) -> Path:
    """An archive of whatever members, names and kinds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in infos:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return path


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's manifest as somebody would who also makes DONE fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)


def change_lines(folder: Path, name: str, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Change each line of a record, and DONE with it."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
    seal(folder)
