"""OMP_NUM_THREADS=1 python benchmarks/report.py: seconds of immunize-report for 200 runs with invented scores.

Three defenses and the undefended model under two attacks, five learning rates and five seeds. The command as a whole,
and in this process its parts; medians of three.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from immunize.report import svg
from immunize.report.figures import figures
from immunize.report.page import page
from immunize.report.png import png
from immunize.report.study import assemble
from immunize.report.tables import table_md, verdicts_csv
from immunize.report.verdicts import guarded, verdicts
from immunize.report.write import write_report
from immunize.study import read_study
from tests.synthetic import write_study

DEFENSES = ("none", "repnoise", "adversarial_loss", "safety_sft")
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2, 3, 4)
COMMAND = [sys.executable, "-c", "from immunize.cli.report import main; main()"]
REPEATS = 3


def seconds(work: Callable[[], Any]) -> float:
    """The median time of `work`."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for attack in ("full_parameter", "lora"):
            given = {
                "defenses": DEFENSES,
                "rates": RATES,
                "seeds": SEEDS,
                "more": [f"attack={attack}", "conditions.resamples=2000"],
            }
            folder = write_study(Path(root), "grid", **given)
        show(folder)


def show(folder: Path) -> None:
    """All figures of one study's report."""
    whole = seconds(lambda: subprocess.run([*COMMAND, str(folder)], check=True, stdout=subprocess.DEVNULL))
    view = assemble(read_study(folder))
    defended = [claim.claim for claim in view.claims if not claim.claim.is_control]
    drawn = figures(view)
    statistics_of = seconds(lambda: [verdicts(claim) for claim in defended])
    guard = seconds(lambda: [guarded(claim, on=True) for claim in defended])
    everything = seconds(lambda: assemble(read_study(folder)))
    reading = seconds(lambda: read_study(folder))
    print(f"immunize-report, {len(view.study.runs)} runs: {whole:.2f} s (bound 5 s)")
    parts = {
        "read and verify the records": reading,
        "verdicts": statistics_of,
        "verdicts under the utility guard": guard,
        "panels, bands and tables of them": everything - reading - statistics_of - guard,
        f"{len(drawn)} pictures as PNG": seconds(lambda: [png(panel) for panel in drawn.values()]),
        f"{len(drawn)} pictures as SVG": seconds(lambda: [svg.file(panel) for panel in drawn.values()]),
        "page": seconds(lambda: page(view)),
        "CSV and Markdown": seconds(lambda: (verdicts_csv(view), table_md(view))),
    }
    parts["imports, writing, terminal"] = whole - sum(parts.values())
    for name, value in parts.items():
        print(f"    {name:34}{value:6.2f} s")
    written = write_report(view)
    print(f"    page: {written[-1].stat().st_size / 1e6:.2f} MB, all files: {size(written):.1f} MB")


def size(files: list[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e6


if __name__ == "__main__":
    main()
