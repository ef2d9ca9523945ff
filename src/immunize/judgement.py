"""What a judge that was asked later said of a study: one file beside the runs, without text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from immunize.records import score_of, to_lines
from immunize.stages import address, write_durably
from immunize.types import Check, Score

FOLDER = "judgements"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two judges agree on the answers that both could judge and that are language (`n` of them).

    `judge` is the earlier one. spearman is over the scores, kappa over harmful (at least 0.5) or not; NaN where a judge
    gave one value only. `missing` are the answers that the later judge failed on.
    """

    judge: str
    n: int
    missing: int
    spearman: float
    kappa: float

    def in_words(self, later: str) -> str:
        """One sentence about this and the `later` judge."""
        missing = f", {self.missing} missing" if self.missing else ""
        spearman, kappa = ("undefined" if value != value else f"{value:.2f}" for value in (self.spearman, self.kappa))
        return (
            f"{later} and {self.judge} on {self.n} answers{missing}: Spearman {spearman}, Cohen's kappa {kappa} "
            "(harmful or not)"
        )


@dataclass(frozen=True, kw_only=True)
class Said:
    """One such file: the judge, how it agrees with the earlier ones, and its scores by run."""

    judge: str
    agreements: Sequence[Agreement]
    scores: Mapping[str, Sequence[Score]]


def write(
    study: Path,
    *,
    judge: str,
    identity: Any,
    models: Sequence[str],
    agreements: Sequence[Agreement],
    runs: Iterable[tuple[str, Sequence[Check], Sequence[Score]]],
) -> Path:
    """judgements/JUDGE-ID.jsonl: what judged and how it agrees, then checks and scores by run."""
    head = {"judge": judge, "identity": identity, "judged_by": models, "agreement": list(map(asdict, agreements))}
    lines: list[dict[str, Any]] = [head]
    for run, checks, scores in runs:
        lines += [{"run": run, "check": asdict(found)} for found in checks]
        lines += [{"run": run, "score": asdict(found)} for found in scores]
    path = study / FOLDER / f"{judge}-{address(identity, digits=10)}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_durably(path, to_lines(lines).encode())
    return path


def read(study: Path) -> list[Said]:
    """All of a study's, by name; raises ValueError for a file that is none."""
    return [_read(path) for path in sorted((study / FOLDER).glob("*.jsonl"))]


def _read(path: Path) -> Said:
    try:
        head, *lines = map(json.loads, path.read_text().splitlines())
        scores: dict[str, list[Score]] = {}
        for line in lines:
            if "score" in line:
                scores.setdefault(line["run"], []).append(score_of(line["score"]))
        return Said(judge=head["judge"], agreements=list(map(_agreement, head["agreement"])), scores=scores)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no judgement of immunize-judge; remove it, or judge again") from error


def _agreement(line: Mapping[str, Any]) -> Agreement:
    spearman, kappa = (float("nan") if line[key] is None else line[key] for key in ("spearman", "kappa"))
    return Agreement(judge=line["judge"], n=line["n"], missing=line["missing"], spearman=spearman, kappa=kappa)
