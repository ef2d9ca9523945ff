"""python benchmarks/grid.py: what a grid costs beside its stages, and what a finished one costs again.

The finished grid has 100 cells with invented scores, so that only composing, reading and the verdicts are timed. The
other grid is real: two defenses, two learning rates and two seeds of the default run on the miniature.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.synthetic import write_study

COMMAND = [sys.executable, "-c", "from immunize.cli.run import main; main()"]
DEFENSES = ("none", "repnoise", "adversarial_loss", "safety_sft")
RATES = ("3e-05", "0.0001", "0.0003", "0.001", "0.003")
SEEDS = ("0", "1", "2", "3", "4")


def immunize(*arguments: str) -> float:
    begun = time.perf_counter()
    subprocess.run([*COMMAND, "-m", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def finished_grid(root: Path) -> float:
    """Seconds of `immunize -m` over 100 cells that are all finished."""
    rates, seeds = [float(rate) for rate in RATES], [int(seed) for seed in SEEDS]
    write_study(root, "finished", defenses=DEFENSES, rates=rates, seeds=seeds)
    return immunize(
        f"runtime.root={root}",
        "study=finished",
        "conditions.resamples=400",
        "tracking=none",
        f"defense={','.join(DEFENSES)}",
        f"budget.learning_rate={','.join(RATES)}",
        f"seed={','.join(SEEDS)}",
    )


def overhead(root: Path) -> tuple[float, float]:
    """Seconds of a real grid, and of the stages in it."""
    sweep = ("defense=repnoise,adversarial_loss", "budget.learning_rate=1e-4,3e-4", "seed=0,1")
    whole = immunize(f"runtime.root={root}", "study=real", *sweep)
    stages = {
        stage["id"]: stage["seconds"]
        for path in root.glob("real/*/manifest.json")
        for stage in json.loads(path.read_text())["stages"]
        if not stage["reused"]
    }
    return whole, sum(stages.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"a finished grid of 100 cells again: {finished_grid(Path(folder)):.1f} s (bound 25 s)")
    with tempfile.TemporaryDirectory() as folder:
        whole, stages = overhead(Path(folder))
        beside = f"beside them {whole / stages - 1:.1%} (bound 5 %)"
        print(f"a grid of 8 cells: {whole:.1f} s, its stages {stages:.1f} s, {beside}")


if __name__ == "__main__":
    main()
