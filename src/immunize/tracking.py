"""A mirror of the records in Weights & Biases, written when a run is finished; the only file that imports wandb."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from immunize.records import Run
from immunize.types import Arm, Check

COLUMNS = (
    "name",
    "judge",
    "verdict",
    "estimate",
    "low",
    "high",
    "threshold",
    "degree",
    "steps_control",
    "steps_defended",
    "censored",
    "flags",
    "reason",
)


@dataclass(frozen=True, kw_only=True)
class NoTracking:
    """Nothing is mirrored; the records are complete without it."""

    def mirror(self, run: Run, *, tags: Sequence[str], figure: Path | None) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """One W&B run for each of ours, grouped by study.

    Offline runs land in the run's own `wandb/`; `wandb sync` uploads them. Generated text is never logged.
    """

    version: ClassVar[int] = 1
    mode: Literal["offline", "online"] = "offline"
    project: str = "immunize"

    def mirror(self, run: Run, *, tags: Sequence[str], figure: Path | None) -> None:
        """Write curves, checks, verdicts, configuration and figure."""
        os.environ.setdefault("WANDB_SILENT", "true")
        # Tables are staged there until they are uploaded; W&B's own choice is the home folder, away from the run.
        os.environ["WANDB_DATA_DIR"] = str((run.path / "wandb").resolve())
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        folder = run.path.parent
        mirrored = wandb.init(
            project=self.project,
            group=folder.name,
            name=run.id,
            id=f"{folder.name}-{run.id}",
            tags=[tag[:64] for tag in tags],
            dir=run.path,
            mode=self.mode,
            config=dict(run.manifest["config"]),
            settings=wandb.Settings(
                x_disable_stats=True, x_disable_meta=True, disable_git=True, host="none", console="off", silent=True
            ),
        )
        exit_code = 1
        try:
            self._log(wandb, mirrored, run, figure)
            exit_code = 0
        finally:
            mirrored.finish(exit_code=exit_code)

    def _log(self, wandb: Any, mirrored: Any, run: Run, figure: Path | None) -> None:
        tables: dict[str, Any] = {
            "condition_checks": wandb.Table(columns=list(COLUMNS), data=[_cells(check) for check in run.checks])
        }
        for title, curves in _curves(run).items():
            tables[f"curves/{title}"] = wandb.plot.line_series(
                xs=[steps for steps, _ in curves.values()],
                ys=[values for _, values in curves.values()],
                keys=list(curves),
                title=title,
                xname="optimizer steps",
            )
        if figure is not None:
            tables["figure"] = wandb.Image(str(figure))
        mirrored.log(tables)
        for name in {row.tuned_on for row in run.rows if row.tuned_on}:
            mirrored.define_metric(f"{name}/*", step_metric=f"{name}/step")
        for line in _history(run):
            mirrored.log(line)
        mirrored.summary.update(summary(run.checks))


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    """Each verdict and degree under a key of its own, by which W&B's table of runs can be sorted.

    Under the check's name stands what the judges agree on, under `name@judge` what each says where there are several.
    """
    found: dict[str, Any] = {}
    for check in checks:
        several = sum(other.name == check.name for other in checks) > 1
        for key in (check.name, f"{check.name}@{check.judge}") if several else (check.name,):
            found[f"verdict/{key}"] = str(check.verdict)
            if check.degree is not None:
                found[f"degree/{key}"] = check.degree
    return found


def _cells(check: Check) -> list[Any]:
    values = {name: getattr(check, name) for name in COLUMNS}
    joined = {name: ", ".join(values[name]) for name in ("censored", "flags")}
    return list({**values, "verdict": str(check.verdict), **joined}.values())


def _curves(run: Run) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Per exposure or trained task and metric, one curve an arm."""
    charts: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in run.rows:
        if row.tuned_on is not None and row.tuned_on == row.measured_on:
            steps, values = charts.setdefault(f"{row.tuned_on}/{row.metric}", {}).setdefault(str(row.arm), ([], []))
            steps.append(row.step)
            values.append(row.value)
    return charts


def _history(run: Run) -> list[Mapping[str, Any]]:
    """One line per exposure or task and step, with both arms' values."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in run.rows:
        if row.tuned_on is None:
            continue
        line = lines.setdefault((row.tuned_on, row.step), {f"{row.tuned_on}/step": row.step})
        prefix = row.tuned_on if row.tuned_on == row.measured_on else f"{row.tuned_on}/{row.measured_on}"
        line[f"{prefix}/{Arm(row.arm)}/{row.metric}"] = row.value
    return list(lines.values())
