"""The verdict table of one run, for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from immunize.records import Run
from immunize.types import Arm, Check, Verdict

STYLES = {Verdict.HOLDS: "bold green", Verdict.FAILS: "bold red", Verdict.UNDETERMINED: "bold yellow"}


def print_run(run: Run, *, console: Console) -> None:
    """What was run, one row per condition check with its reason below, and where everything lies."""
    console.print(_headline(run.manifest))
    if run.checks:
        console.print(_table(run.checks, wide=console.width >= 100))
        console.print(_legend(run.checks), style="dim")
    else:
        console.print("No defense: curves of the control only, and nothing to check.")
    console.print(f"Records: {run.path}/", highlight=False, soft_wrap=True)


def _headline(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    defense = ", ".join(config["defense"]) or "none"
    budget = config["budget"]
    return (
        f"[bold]defense {defense}[/bold] against control {config['control']}, seed {config['seed']}; attack budget: "
        f"learning rate {budget['learning_rate']:g}, {budget['samples']} samples x {budget['epochs']} epochs, "
        f"batch {budget['batch_size']}"
    )


def _table(checks: Sequence[Check], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("estimate", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("degree", justify="right", no_wrap=True)
    table.add_column("steps C / D", no_wrap=True)
    if wide:
        table.add_column("reason")
    for check in checks:
        reason = _reason(check)
        cells: list[Text | str] = [
            _name(check, checks),
            Text(check.verdict, style=STYLES[check.verdict]),
            _estimate(check),
            _number(check.threshold),
            _number(check.degree),
            _steps(check),
        ]
        table.add_row(*cells, *([reason] if wide else []))
        if not wide:
            table.add_row(Text(f"  {reason}", style="dim"), end_section=True)
    if not wide:
        table.columns[0].no_wrap = False
    return table


def _name(check: Check, checks: Sequence[Check]) -> str:
    several = sum(other.name == check.name for other in checks) > 1
    return f"{check.name} ({check.judge})" if several else check.name


def _reason(check: Check) -> str:
    flags = f" [{', '.join(check.flags)}]" if check.flags else ""
    return check.reason + flags


def _estimate(check: Check) -> str:
    if check.estimate is None:
        return "-"
    if check.low is None or check.high is None:
        return f"{check.estimate:.2f}"
    return f"{check.estimate:.2f} [{check.low:.2f}, {check.high:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _steps(check: Check) -> str:
    if check.steps_control is None and check.steps_defended is None:
        return "-"
    return " / ".join(
        "-" if steps is None else f"{'>' if arm in check.censored else ''}{steps}"
        for arm, steps in ((Arm.CONTROL, check.steps_control), (Arm.DEFENDED, check.steps_defended))
    )


def _legend(checks: Sequence[Check]) -> str:
    judges = sorted({check.judge for check in checks if check.name.startswith(("resistance", "generalization"))})
    return (
        f"estimate with 95 % interval against its limit; degree: 1 is best (for cost and trainability a ratio of "
        f"steps); steps to the threshold of Control / Defended, > where never crossed; judge: {', '.join(judges)}"
    )
