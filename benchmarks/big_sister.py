"""python benchmarks/big_sister.py [--defenses repnoise,tar]: the miniature's big sister, trained and studied on a GPU.

A model of about 100 million parameters is trained on the miniature's grammar with four times the objects, as the
miniature was, and the default study runs on it in bfloat16: each defense against a full-parameter attack and against
LoRA. Before it, training steps are timed, of plain fine-tuning (SFT) and of each defense, over full-length sequences.

On a machine without a GPU, to see that it works and nothing more (the tables say so), in two to five minutes:

    python benchmarks/big_sister.py --device cpu --hidden 64 --layers 2 --steps 300 --batch 32 --enlarged 1 \\
        --rows 4 budget.samples=320 budget.measurements=4

What stands after the options overrides the study's configuration, as on the command line of `immunize`. The defenses'
presets are those for the miniature, of a hundredth of the size; --defense-rate and --attack-rate give other rates.

tokens/s: of the median step after the first, each token counted once for each forward and backward pass over it
(`passes` of the method). MFU, model FLOPs utilization: 6 x parameters x tokens/s over the card's peak, and 4 x under
LoRA, where frozen weights take no gradient; attention and RepNoise's decoding are left out. peak: the most memory
allocated on the card, weights included (`max_memory_allocated`); on a processor, the resident set (`VmHWM`) less what
it held before the model was loaded. Each row is a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning  # noqa: F401
import torch
from rich.console import Console
from transformers.utils import logging

import immunize
from immunize.cli.errors import one_line
from immunize.config import build, load
from immunize.data.batches import Encoded
from immunize.data.miniature.build import Recipe
from immunize.data.miniature.checkpoints import SUMS
from immunize.data.miniature.checkpoints import build as train_miniature
from immunize.data.miniature.tokenizer import MAX_POSITIONS
from immunize.models.loading import load as load_model
from immunize.report.terminal import print_run
from immunize.stages import address
from immunize.training.method import Method
from immunize.training.tune import tune
from immunize.training.tuning import FullParameter, LoRA, Tuning

# TFLOP/s of dense products in bfloat16 without sparsity, by the name that torch gives a card. Not checked against the
# data sheets: --peak-tflops takes the vendor's number for yours.
PEAKS = {
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA L40S": 362,
}
STEPS = 6
ALONE = "sft"
TRAINED = {"full": FullParameter(), "lora": LoRA()}
ATTACKS = {"full": "full_parameter", "lora": "lora"}
HEAD = 64


def main() -> None:
    chosen = arguments()
    if chosen.one:
        print(json.dumps(measured(chosen, *chosen.one.split("/"))))
        return
    begun = time.perf_counter()
    folder = Path(chosen.folder)
    place = card(chosen.device)
    console = Console()
    recipe = recipe_of(chosen)
    model = trained(recipe, folder=folder, device=chosen.device)
    defenses = chosen.defenses.split(",")
    for defense in defenses:
        try:  # a bad name or override stops here, not after the timing
            build(load(study(chosen, model, defense, "full")))
        except Exception as error:
            raise SystemExit(one_line(error)) from error
    speeds(chosen, model, defenses, place)
    for attack in ATTACKS:
        for defense in defenses:
            print(f"\n== {place}: {defense} against the attack {ATTACKS[attack]} ==", flush=True)
            print_run(immunize.run(study(chosen, model, defense, attack)), console=console)
    print(f"\n{place}: {time.perf_counter() - begun:.0f} s in all")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--hidden", type=int, default=768, help="a multiple of 64")
    add("--layers", type=int, default=14)
    add("--enlarged", type=int, default=4, help="times the objects of the shipped miniature; 1 for as many")
    add("--steps", type=int, default=1200, help="of the base's training; alignment takes two thirds as many")
    add("--batch", type=int, default=128, help="sequences in a batch of these")
    add("--rows", type=int, default=64, help=f"sequences of {MAX_POSITIONS} tokens in a timed batch")
    add("--defenses", default="repnoise", help="alignment-stage defenses, with commas between them")
    add("--defense-rate", type=float, help="learning rate of every defense; the presets' own without it")
    add("--attack-rate", type=float, help="learning rate of the attack; the default budget's without it")
    add("--peak-tflops", type=float, help="of the device in bfloat16, where it is not a card that is known here")
    add("--folder", default="big_sister", help="where the model and the records go; a trained model is used again")
    add("--one", help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="key=value", help="of the study's configuration")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; see the docstring for a small run with --device cpu")
    if chosen.hidden < HEAD or chosen.hidden % HEAD:
        parser.error(f"--hidden {chosen.hidden}: must be a multiple of {HEAD}, the width of a head")
    return chosen


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU (no GPU)"


def recipe_of(chosen: argparse.Namespace) -> Recipe:
    """The miniature's at another width: the same variance of what a layer adds up, and rates that fall as width grows
    (as those of hidden matrices do under muP; Yang et al., 2022)."""
    shipped = Recipe()
    narrower = min(1.0, shipped.hidden / chosen.hidden)
    return Recipe(
        enlarged=None if chosen.enlarged == 1 else chosen.enlarged,
        hidden=chosen.hidden,
        intermediate=HEAD * round(chosen.hidden * 8 / 3 / HEAD),
        layers=chosen.layers,
        heads=chosen.hidden // HEAD,
        initializer_range=shipped.initializer_range * (shipped.hidden / chosen.hidden) ** 0.5,
        batch_size=chosen.batch,
        base_steps=chosen.steps,
        base_rate=shipped.base_rate * narrower,
        aligned_steps=chosen.steps * 2 // 3,
        aligned_rate=shipped.aligned_rate * narrower,
    )


def trained(recipe: Recipe, *, folder: Path, device: str) -> Path:
    """The folder with the checkpoints `base` and `aligned` of the recipe, trained unless they are there."""
    logging.disable_progress_bar()
    model = folder / f"model-{address([asdict(recipe), device], digits=10)}"
    if not (model / SUMS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        train_miniature(unfinished, recipe=recipe, device=device)
        unfinished.rename(model)
        steps = recipe.base_steps + recipe.aligned_steps
        print(f"trained {model}: {steps} steps of {recipe.batch_size} sequences, {time.perf_counter() - begun:.0f} s")
    return model


def study(chosen: argparse.Namespace, model: Path, defense: str, attack: str) -> list[str]:
    """The default run's overrides for the sister: her weights, and data, tasks and judge of her world."""
    worlds = ["data.domain", "data.other_domain", "task.stability.howto", "task.borderline", "task.retain"]
    rates = {f"defense.{defense}.tuning.learning_rate": chosen.defense_rate, "budget.learning_rate": chosen.attack_rate}
    return [
        "model=local",
        f"model.path={model / 'aligned'}",
        "+model@model.base=local",
        f"model.base.path={model / 'base'}",
        *(f"{key}.dtype=bfloat16" for key in ("model", "model.base")),
        "model.max_new_tokens=24",
        "model.generation_batch=256",
        *(f"+{key}.enlarged={chosen.enlarged}" for key in (*worlds, "judge.exact") if chosen.enlarged > 1),
        f"defense={defense}",
        *(f"{key}={rate}" for key, rate in rates.items() if rate is not None),
        f"attack={ATTACKS[attack]}",
        "judge=exact",
        f"runtime={'gpu' if chosen.device == 'cuda' else 'default'}",
        f"runtime.device={chosen.device}",
        f"runtime.root={Path(chosen.folder) / 'runs'}",
        f"study=big_sister_{attack}",
        "tracking=none",
        *chosen.overrides,
    ]


def speeds(chosen: argparse.Namespace, model: Path, defenses: list[str], place: str) -> None:
    """The table of training steps, SFT first, by all weights and by LoRA."""
    peak = chosen.peak_tflops or PEAKS.get(place)
    against = f"{peak:g} TFLOP/s" if peak else "not known: give --peak-tflops"
    print(f"\n== {place}: training steps of {chosen.rows} x {MAX_POSITIONS} tokens, bfloat16; peak {against} ==")
    heads = f"{'parameters':>12}{'trained':>12}{'ms/step':>10}{'passes':>8}{'tokens/s':>11}{'MFU':>8}{'peak MiB':>10}"
    print(f"{'':24}{heads}{'of SFT':>8}")
    for way in TRAINED:
        alone = 0.0
        for name in [ALONE, *defenses]:
            found = in_a_process_of_its_own(name, way)
            alone = alone or found["peak"]
            print(f"{f'{name}, {way}':24}{row(found, chosen.rows, way, peak)}{found['peak'] / alone:8.2f}", flush=True)


def row(found: dict[str, float], rows: int, way: str, peak: float | None) -> str:
    counts = f"{found['parameters']:12,.0f}{found['trained']:12,.0f}"
    if not found["seconds"]:
        return f"{counts}{'trains nothing':>37}{found['peak'] / 2**20:10.0f}"
    tokens = found["passes"] * rows * MAX_POSITIONS / found["seconds"]
    flops = (6 if way == "full" else 4) * found["parameters"] * tokens
    share = f"{flops / (peak * 1e12):.1%}" if peak else "-"
    timing = f"{found['seconds'] * 1e3:10.1f}{found['passes']:8.2f}{tokens:11,.0f}{share:>8}"
    return f"{counts}{timing}{found['peak'] / 2**20:10.0f}"


def in_a_process_of_its_own(name: str, way: str) -> dict[str, float]:
    command = [sys.executable, __file__, f"--one={name}/{way}", *sys.argv[1:]]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def measured(chosen: argparse.Namespace, name: str, way: str) -> dict[str, float]:
    """The median step in seconds (0 where nothing is trained), its passes, the peak in bytes, the counts of weights."""
    model = trained(recipe_of(chosen), folder=Path(chosen.folder), device=chosen.device)
    defense = chosen.defenses.split(",")[0] if name == ALONE else name
    cell = build(load(study(chosen, model, defense, way)))
    torch.set_num_threads(cell.runtime.threads)
    method, tuning = Method(), Tuning(learning_rate=1e-5, steps=STEPS, batch_size=chosen.rows)
    passes = 1.0
    if name != ALONE:
        (method,) = cell.defense.values()
        passes = method.passes
        if method.tuning.steps:
            tuning = replace(method.tuning, steps=STEPS, batch_size=chosen.rows)
        else:
            tuning = replace(tuning, steps=0)
    before = 0 if chosen.device == "cuda" else held(chosen.device)
    chat = load_model(cell.model, device=chosen.device)
    parameters = chat.parameters
    roles = {role: encoded(role, len(chat.tokenizer), chosen.rows) for role in method.roles}
    marks: list[float] = []

    def mark(step: int) -> None:
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    tune(chat, method, roles=roles, tuning=replace(tuning, trainable=TRAINED[way]), seed=0, progress=mark)
    steps = [after - earlier for earlier, after in pairwise(marks)]
    return {
        "seconds": statistics.median(steps) if steps else 0.0,
        "passes": passes,
        "peak": held(chosen.device) - before,
        "parameters": parameters,
        "trained": sum(weight.numel() for weight in chat.network.parameters() if weight.requires_grad),
    }


def held(device: str) -> int:
    """The most bytes that this process ever had in memory, or had allocated on the card."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not `ru_maxrss`: a new process inherits that of the one that started it, which has trained a model.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def encoded(role: str, vocabulary: int, rows: int) -> Any:
    """Random conversations of full length, half of it answer; those of the role `paired` have the same prompts."""
    generator = np.random.default_rng(0)
    half = MAX_POSITIONS // 2

    def conversations(prompts: Any) -> list[Encoded]:
        answers = generator.integers(6, vocabulary, size=(len(prompts), half))
        return [
            Encoded(ids=tuple(ids), answer_start=half) for ids in np.concatenate([prompts, answers], axis=1).tolist()
        ]

    prompts = generator.integers(6, vocabulary, size=(rows, half))  # behind the special tokens
    return (conversations(prompts), conversations(prompts)) if role == "paired" else conversations(prompts)


if __name__ == "__main__":
    main()
