"""What a grid would cost, before anything is run: stages, steps, tokens, FLOPs, and time where a speed is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy

from immunize import records
from immunize.config import Cell
from immunize.manifest import without_paths
from immunize.runner import choose_device, plan
from immunize.stages import Event

KINDS = ("prepare", "measure", "benchmark", "attack", "train", "calibrate", "score")


@dataclass(kw_only=True)
class Plan:
    """Sums over the distinct stages of all cells.

    `flops` is the usual estimate, 6 x parameters x tokens for each pass of training; None where the model's size is not
    known. `seconds` is for one worker, from the speed of like stages measured before; `unmeasured` names what has none.
    """

    cells: int = 0
    finished: int = 0
    run: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    reuse: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    steps: int = 0
    answers: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    measured: int = 0
    unmeasured: set[str] = field(default_factory=set)
    unknown: str | None = None


def plan_grid(cells: Sequence[Cell]) -> Plan:
    """Count every stage of every cell once; a stage that is there already costs nothing."""
    found, seen = Plan(cells=len(cells)), set[str]()
    sizes, speeds = _Sizes(), _Speeds(cells[0].root)
    for cell in cells:
        found.finished += records.is_finished(cell.folder)
        device = choose_device(cell.runtime.device)
        for event in plan(cell, device=device):
            if event.id in seen:
                continue
            seen.add(event.id)
            (found.reuse if event.reused else found.run)[event.kind] += 1
            if not event.reused:
                _add(found, event, cell, sizes, speeds.seconds(event, cell, device=device))
    return found


def _add(found: Plan, event: Event, cell: Cell, sizes: "_Sizes", seconds: float | None) -> None:
    work = event.work
    found.steps += work.steps
    found.answers += work.answers
    if work.steps:
        try:
            parameters, tokens = sizes.of(cell.model, work.pairs)
            trained = work.steps * work.batch_size * work.passes * tokens
            found.tokens += trained
            found.flops += 6.0 * parameters * trained
        except (OSError, ValueError) as error:
            found.unknown = str(error).splitlines()[0]
    if seconds is None:
        found.unmeasured.add(_alike(event.kind, event.label))
    else:
        found.seconds += seconds
        found.measured += 1


class _Sizes:
    """Parameters of a model, and tokens per conversation of a data set, each looked up once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str | None], Any] = {}
        self._tokens: dict[tuple[Any, ...], float] = {}

    def of(self, model: Any, pairs: Sequence[Any]) -> tuple[int, float]:
        from immunize.models.loading import outline
        from immunize.training.roles import encode_pairs

        place = (model.location, model.revision)
        if place not in self._models:
            self._models[place] = outline(model)
        chat = self._models[place]
        key = (place, *pairs)
        if key not in self._tokens:
            self._tokens[key] = fmean(len(item.ids) for item in encode_pairs(chat, pairs))
        return chat.parameters, self._tokens[key]


class _Speeds:
    """Seconds of the stages that were run before, as the manifests below `root` tell."""

    def __init__(self, root: Path) -> None:
        self._known: dict[tuple[str, ...], list[tuple[int, int, float]]] = {}
        for path in root.glob("*/*/manifest.json"):
            try:
                self._read(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # another version's, or half of one: it says nothing of speed

    def _read(self, manifest: Mapping[str, Any]) -> None:
        if manifest["status"] != "finished":
            return  # its stages were planned, and took no time
        for stage in manifest["stages"]:
            if not stage["reused"]:
                key = _key(stage["kind"], stage["label"], manifest["config"], manifest["hardware"]["device"])
                self._known.setdefault(key, []).append((stage["steps"], stage["answers"], stage["seconds"]))

    def seconds(self, event: Event, cell: Cell, *, device: str) -> float | None:
        """Linear in steps and answers, fitted to like stages; None where there are none."""
        known = self._known.get(_key(event.kind, event.label, without_paths(cell.config), device))
        if not known:
            return None
        data = numpy.asarray(known, dtype=numpy.float64)
        if not data[:, :2].any():
            return float(data[:, 2].mean())
        scale = numpy.maximum(data[:, :2].mean(axis=0), 1.0)
        slopes = numpy.linalg.lstsq(data[:, :2] / scale, data[:, 2], rcond=None)[0]
        return max(0.0, float(numpy.asarray([event.work.steps, event.work.answers]) / scale @ slopes))


def _key(kind: str, label: str, config: Mapping[str, Any], device: str) -> tuple[str, ...]:
    model, runtime = json.dumps(config["model"], sort_keys=True), config["runtime"]
    return _alike(kind, label), model, device, str(runtime["threads"]), str(runtime.get("devices", 1))


def _alike(kind: str, label: str) -> str:
    """Stages of one kind take alike long, but a preparation depends on its defense, a benchmark on which it is."""
    return f"{kind} {label.rpartition(' ')[2]}" if kind in ("prepare", "benchmark") else kind
