"""What the suite asks of a benchmark, which is measured on the model itself, and what its stage leaves behind."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from immunize.records import evaluation_set_of
from immunize.types import EvaluationSet


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One score for each item of a set. No text.

    The metric is `score`, in [0, 1], for a set of the kind benchmark, and `minus_loss` (nats per token) for a text.
    """

    items: EvaluationSet
    metric: Literal["score", "minus_loss"]
    scores: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.scores) == len(self.items.ids)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark measured; `about` is what it is to be recorded with, such as versions, by the sets' names."""

    measured: Sequence[Measured]
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Benchmark(Protocol):
    """Measures capability on a model in memory, in eval mode; `names` are those of the sets that it reports."""

    version: ClassVar[int]

    @property
    def names(self) -> Sequence[str]: ...
    def check(self) -> None:
        """Raise ValueError where it cannot be measured here, before anything is trained."""

    def measure(self, chat: Any, *, batch_size: int) -> Report: ...


def save_report(folder: Path, report: Report) -> None:
    """Write measured.jsonl and about.json."""
    lines = [json.dumps(asdict(item)) + "\n" for item in report.measured]
    (folder / "measured.jsonl").write_text("".join(lines))
    (folder / "about.json").write_text(json.dumps(report.about, indent=1, sort_keys=True) + "\n")


def load_report(folder: Path) -> Report:
    lines = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    return Report(
        measured=[
            Measured(items=evaluation_set_of(line["items"]), metric=line["metric"], scores=tuple(line["scores"]))
            for line in lines
        ],
        about=json.loads((folder / "about.json").read_text()),
    )
