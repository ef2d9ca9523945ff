"""A study as tidy pandas frames, for notebooks."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize.records import Run
from immunize.study import Study, read_study

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Frames:
    """One row per check, per point of a curve, and per item's score; each names its run, defense, attack cell and seed.

    checks: the entries of every checks.json. curves: the lines of every curve.jsonl. scores: judge, metric, step, item,
    object, half, score and outcome. study: what the frames were made of.
    """

    checks: "pandas.DataFrame"
    curves: "pandas.DataFrame"
    scores: "pandas.DataFrame"
    study: Study


def load_study(path: "str | Path") -> Frames:
    """Read the finished runs of a study, such as multirun/first_grid; raises ValueError where there are none."""
    import pandas

    study = read_study(Path(path))
    if not study.runs:
        raise ValueError(f"{path}: none of its {len(study.unfinished)} runs is finished")
    described = [
        (_description(run, claim.name, cell), run)
        for claim in study.claims
        for cell, runs in claim.cells.items()
        for run in runs
    ]
    return Frames(
        checks=pandas.DataFrame([head | asdict(item) for head, run in described for item in run.checks]),
        curves=pandas.DataFrame([head | asdict(item) for head, run in described for item in run.rows]),
        scores=pandas.concat(
            [pandas.DataFrame(part) for head, run in described for part in _scores(head, run)], ignore_index=True
        ),
        study=study,
    )


def _description(run: Run, defense: str, cell: str) -> dict[str, Any]:
    config = run.manifest["config"]
    rate = config["budget"]["learning_rate"]
    return {"run": run.id, "defense": defense, "cell": cell, "learning_rate": rate, "seed": config["seed"]}


def _scores(head: Mapping[str, Any], run: Run) -> Iterable[dict[str, Any]]:
    """One table per line of scores.jsonl; scalars spread over its items."""
    sets = {item.name: item for item in run.sets}
    for line in run.scores:
        items = sets[line.measured_on]
        yield {
            **head,
            "arm": str(line.arm),
            "tuned_on": line.tuned_on,
            "measured_on": line.measured_on,
            "step": line.step,
            "judge": line.judge,
            "metric": line.metric,
            "item": items.ids,
            "object": items.objects,
            "half": [str(half) for half in items.halves],
            "score": line.scores,
            "outcome": [None if item is None else str(item) for item in line.outcomes] or None,
        }
