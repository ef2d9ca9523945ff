"""Whether what was parsed has the form of records and manifests, before anything relies on it."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from immunize.records import ERROR
from immunize.sharing.inert import parse, plain
from immunize.types import Check, EvaluationSet, Row, Score

RANGES = {"minus_loss": (-math.inf, 0.0)}  # of scores; of all others it is [0, 1]
LINES: Mapping[str, Any] = {
    "items.jsonl": list[EvaluationSet],
    "curve.jsonl": list[Row],
    "scores.jsonl": list[Score],
}


@dataclass
class Open:
    """A mapping that may hold further keys."""

    open: ClassVar[bool] = True


@dataclass
class Budget(Open):
    """`config.budget`, as far as a study reads it."""

    learning_rate: float


@dataclass
class Runtime(Open):
    """`config.runtime`, as far as a replay reads it."""

    threads: int


@dataclass
class Config(Open):
    """`config` of a manifest."""

    study: str
    seed: int
    control: str
    figure: str
    model: Mapping[str, Any]
    defense: Mapping[str, Mapping[str, Any]]
    threat: Mapping[str, Any]
    attack: Mapping[str, Any]
    budget: Budget
    data: Mapping[str, Any]
    task: Mapping[str, Any]
    split: Mapping[str, Any]
    judge: Mapping[str, Mapping[str, Any]]
    conditions: Mapping[str, Any]
    runtime: Runtime
    tracking: Mapping[str, Any]


@dataclass
class Code(Open):
    """`code` of a manifest; null for a package that does not run from a checkout."""

    commit: str | None
    dirty: bool | None
    lock: str | None


@dataclass
class Hardware(Open):
    """`hardware` of a manifest."""

    machine: str
    system: str
    python: str
    cpu_capability: str
    device: Literal["cpu", "cuda"]


@dataclass
class Manifest(Open):
    """manifest.json of a run, finished or failed."""

    run_id: str
    config: Config
    identity: Mapping[str, Any]
    code: Code
    packages: Mapping[str, str | None]
    hardware: Hardware
    status: Literal["finished", "failed", "running"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run's folder; raises ValueError where it lacks a key or has one of a wrong type."""
    try:
        found = parse((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json: cannot be read ({plain(error)})") from error
    wrong = complaint(found, Manifest, key="manifest.json")
    if wrong:
        raise ValueError(wrong)
    return found


def record_faults(folder: Path) -> list[str]:
    """What of a finished run's records does not parse, one line each file."""
    return [wrong for name in (*LINES, "checks.json") if (wrong := _record_fault(folder, name)) is not None]


def is_failed(folder: Path) -> bool:
    """Whether the run ended with an error."""
    return (folder / ERROR).exists()


def _record_fault(folder: Path, name: str) -> str | None:
    try:
        text = (folder / name).read_text(encoding="utf-8")
        if name in LINES:
            found = [parse(line) for line in text.splitlines()]
            return complaint(found, LINES[name], key=name) or (_range_fault(found) if name == "scores.jsonl" else None)
        return complaint(parse(text), list[Check], key=name)
    except (OSError, ValueError) as error:
        return f"{name}: cannot be read ({plain(error)})"


def _range_fault(lines: Sequence[Mapping[str, Any]]) -> str | None:
    for index, line in enumerate(lines):
        low, high = RANGES.get(line["metric"], (0.0, 1.0))
        if any(value is not None and not low <= value <= high for value in line["scores"]):
            return f"scores.jsonl[{index}]: a score lies outside of [{low:g}, {high:g}]"
    return None


def complaint(value: Any, annotation: Any, *, key: str) -> str | None:
    """The first place in `value` that does not fit the annotation, in words; null fits a number (JSON has no NaN)."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return None
    if origin in (typing.Union, types.UnionType):
        found = [complaint(value, option, key=key) for option in arguments]
        return None if None in found else found[0]
    if origin is Literal:
        return None if value in arguments else f"{key}: must be one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list):
            return f"{key}: must be a list"
        if arguments[0] in (str, float) and all(_is(item, arguments[0]) for item in value):
            return None
        return _first(complaint(item, arguments[0], key=f"{key}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            return f"{key}: must be a mapping"
        return _first(complaint(item, arguments[1], key=f"{key}.{plain(name)}") for name, item in value.items())
    if dataclasses.is_dataclass(annotation):
        return _fields(value, annotation, key)
    return None if _is(value, annotation) else f"{key}: must be {_name(annotation)}, not {plain(value, longest=60)}"


def _fields(value: Any, cls: Any, key: str) -> str | None:
    if not isinstance(value, dict):
        return f"{key}: must be a mapping"
    known, names = _known(cls)
    missing = [name for name in names if name not in value]
    if missing:
        return f"{key}: lacks {', '.join(missing)}"
    unknown = [name for name in value if name not in names]
    if unknown and not getattr(cls, "open", False):
        return f"{key}: has no key {plain(unknown[0], longest=60)}"
    return _first(complaint(value[name], known[name], key=f"{key}.{name}") for name in names)


@cache
def _known(cls: Any) -> tuple[dict[str, Any], list[str]]:
    return typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]


def _is(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return value in [option.value for option in annotation]
    return value is None if annotation is type(None) else isinstance(value, annotation)


def _name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(option.value for option in annotation)}"
    return names[annotation]


def _first(found: Any) -> str | None:
    return next((wrong for wrong in found if wrong is not None), None)
