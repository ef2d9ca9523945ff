"""immunize-plan [-m] [key=value ...]: what the same arguments would cost `immunize`; runs nothing."""

import os
import sys
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from immunize.cli.compose import compose_all
from immunize.cli.errors import reported

if TYPE_CHECKING:
    from immunize.plan import Plan


def main() -> None:
    """The console command; exit code 2 for a bad configuration."""
    sys.exit(reported(_command))


def _command() -> None:
    from immunize.plan import KINDS, plan_grid

    cells = compose_all(sys.argv[1:]).cells
    if not cells:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    plan = plan_grid(cells)
    console = Console(highlight=False)
    console.print(f"{plan.cells} runs, {plan.finished} of them finished")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("stages", "to run", "there already"):
        table.add_column(heading, justify="left" if heading == "stages" else "right")
    for kind in KINDS:
        table.add_row(kind, str(plan.run[kind]), str(plan.reuse[kind]))
    table.add_row("all", str(sum(plan.run.values())), str(sum(plan.reuse.values())), style="bold")
    console.print(table)
    console.print(_cost(plan))
    console.print(_time(plan))


def _cost(plan: "Plan") -> str:
    trained = f"{plan.steps:,} optimizer steps, {plan.answers:,} answers"
    if plan.unknown is not None:
        return f"to run: {trained}; tokens and FLOPs unknown ({plan.unknown})"
    return (
        f"to run: {trained}, about {plan.tokens:,.0f} trained tokens, {plan.flops:.2g} FLOPs (6 x parameters x tokens)"
    )


def _time(plan: "Plan") -> str:
    total = sum(plan.run.values())
    if not total:
        return "time: nothing is left to run"
    if not plan.measured:
        return "time: unknown, since nothing like it has been run here"
    rest = f"; never run here: {', '.join(sorted(plan.unmeasured))}" if plan.unmeasured else ""
    return f"time: about {_duration(plan.seconds)} on one worker for {plan.measured} of {total} stages{rest}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
