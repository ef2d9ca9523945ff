"""immunize [-m] [key=value ...]: run one configuration (or, with -m, each of a sweep) and show its verdicts."""

import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from immunize.cli.errors import report, reported
from immunize.config import CONFIG_MODULE, CONFIG_NAME, register
from immunize.records import RunFailedError

if TYPE_CHECKING:
    from immunize.config import Cell

register()
cells: "list[Cell]" = []
mistakes: list[Exception] = []


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _compose(config: DictConfig) -> None:
    """Build one cell. Nothing may leave this function: Hydra would print an error in its own way."""
    from immunize.config import build

    try:
        cells.append(build(config))
    except Exception as error:
        mistakes.append(error)


def _command() -> None:
    """Build every cell first, so that a bad value in the last stops the first; then run them."""
    _compose()
    for mistake in mistakes[:-1]:
        report(mistake)
    if mistakes:
        raise mistakes[-1]
    failed = [error for error in map(_run, cells) if error is not None]
    if len(cells) > 1 and failed:
        raise RunFailedError(f"{len(failed)} of {len(cells)} runs failed; the same command tries these again")
    if failed:
        raise failed[0]


def _run(cell: "Cell") -> RunFailedError | None:
    from rich.console import Console

    from immunize.report.terminal import print_run
    from immunize.runner import execute

    try:
        run = execute(cell)
    except RunFailedError as error:
        if len(cells) > 1:
            report(error)
        return error
    print_run(run, console=Console())
    return None


def main() -> None:
    """The console command; exit code 0 whatever the verdicts, 1 when a run failed, 2 for a bad configuration."""
    sys.exit(reported(_command))
