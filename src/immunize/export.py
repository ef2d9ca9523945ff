"""A defended model as an ordinary Hugging Face folder, with a model card that carries the verdicts."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from immunize.records import Run, read
from immunize.stages import damage, write_durably
from immunize.types import Check

CARD = """---
library_name: transformers
tags: [immunize, harmful-fine-tuning-defense]
---
# {title}

The model `{model}` after the defense {defense}, seed {seed}, as prepared and checked by immunize {version}.

What its run found, under an attack of {samples} samples at learning rate {rate:g} ({attack}), batch {batch}:

| check | verdict | estimate | interval | limit | judge |
|---|---|---|---|---|---|
{rows}

A verdict speaks of this seed, this attack and this budget, and of nothing else. *Undetermined* means that the run could
not tell. The full record is `immunize-run.json` beside this card (run `{run}`).
"""


def export(run_folder: Path, *, to: Path) -> Run:
    """Copy the defended weights of a finished run to the new folder `to`; raises ValueError where it cannot be done."""
    if not (run_folder / "manifest.json").is_file():
        raise ValueError(f"{run_folder}: is no run; give its folder, multirun/STUDY/RUN_ID")
    run = read(run_folder)
    config = run.manifest["config"]
    if not config["defense"]:
        raise ValueError(f"run {run.id}: defense=none leaves the model as it was; there is nothing to export")
    weights = _weights(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to {to}: exists already; give a new folder")
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    shutil.copytree(weights, temporary)
    write_durably(temporary / "README.md", card(run).encode())
    write_durably(temporary / "immunize-run.json", (run.path / "manifest.json").read_bytes())
    if to.exists():
        to.rmdir()
    temporary.rename(to)
    return run


def card(run: Run) -> str:
    """The model card."""
    config, manifest = run.manifest["config"], run.manifest
    defense, model = "+".join(config["defense"]), _model_name(config["model"])
    return CARD.format(
        title=f"{model}, defended by {defense}",
        model=model,
        defense=defense,
        seed=config["seed"],
        version=manifest["packages"]["immunize"],
        samples=config["budget"]["samples"],
        rate=config["budget"]["learning_rate"],
        batch=config["budget"]["batch_size"],
        attack=str(config["attack"]["trainable"]["_target_"]).rpartition(".")[2],
        rows="\n".join(_row(check) for check in run.checks),
        run=run.id,
    )


def _weights(run: Run) -> Path:
    """The folder of the last stage that prepared the defended arm."""
    root = run.path.parent.parent / ".stages" / "prepare"
    prepared = [
        stage["id"]
        for stage in run.manifest["stages"]
        if stage["kind"] == "prepare" and stage["label"].startswith("defended")
    ]
    folder = root / prepared[-1] if prepared else root
    if not prepared or not (folder / "weights").is_dir():
        raise ValueError(
            f"run {run.id}: its defended weights are not in {root}; remove {run.path} and give the run's command again"
        )
    problem = damage(folder)
    if problem:
        raise ValueError(f"run {run.id}: the stage of its weights is damaged: {problem}")
    return folder / "weights"


def _model_name(config: Mapping[str, Any]) -> str:
    named = config.get("id") or config.get("path") or config.get("checkpoint")
    return Path(str(named)).name if named else json.dumps(config["_target_"])


def _row(check: Check) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    interval = "-" if check.low is None else f"{number(check.low)} to {number(check.high)}"
    flags = f" ({', '.join(check.flags)})" if check.flags else ""
    cells = (
        f"{check.name}{flags}",
        str(check.verdict),
        number(check.estimate),
        interval,
        number(check.threshold),
        check.judge,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
