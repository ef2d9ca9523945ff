"""Which stages no run refers to, and their removal. Nothing outside `.stages` is ever touched."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

STAGES = ".stages"


@dataclass(frozen=True, kw_only=True)
class Unused:
    """A folder below `.stages`: a stage that no run names, or what a damaged or killed one left."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


def unused_stages(root: Path) -> list[Unused]:
    """Every stage that no manifest below `root` names; a run names its stages from its start, not only when it ends.

    Raises ValueError where a manifest cannot be read: what it refers to is not known.
    """
    stages = root / STAGES
    if not stages.is_dir():
        raise ValueError(f"{stages}: no such folder; runtime.root is the folder that holds the studies")
    used = set(_used(root))
    return [
        Unused(path=path, size=sum(item.stat().st_size for item in path.rglob("*") if item.is_file()))
        for path in sorted(stages.glob("*/*"))
        if path.is_dir() and not path.is_symlink() and (path.parent.name, path.name) not in used
    ]


def remove(unused: Unused) -> bool:
    """Remove one folder; False where a worker is at work on it."""
    name = unused.path.name.lstrip(".").partition(".")[0]  # of the stage itself, also for .ID.making and ID.damaged-N
    try:
        with FileLock(unused.path.with_name(f".{name}.lock"), timeout=0):
            shutil.rmtree(unused.path)
    except Timeout:
        return False
    return True


def _used(root: Path) -> Iterator[tuple[str, str]]:
    for path in root.glob("*/*/manifest.json"):
        try:
            stages = json.loads(path.read_text())["stages"]
            yield from [(stage["kind"], stage["id"]) for stage in stages]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read, so it is not known which stages its run needs; remove that run's folder, or "
                "run it again"
            ) from error
