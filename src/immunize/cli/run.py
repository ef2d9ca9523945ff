"""immunize [-m] [key=value ...]: run one configuration (or, with -m, each of a sweep) and show its verdicts."""

import sys

import hydra
from omegaconf import DictConfig

from immunize.cli.errors import report, reported
from immunize.config import CONFIG_MODULE, CONFIG_NAME, register

register()


failures: list[Exception] = []


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _compose_and_run(config: DictConfig) -> None:
    # Nothing may leave this function: Hydra would print the error in its own way, and end a sweep on some of them.
    try:
        _run(config)
    except Exception as error:
        failures.append(error)


def _run(config: DictConfig) -> None:
    from rich.console import Console

    from immunize.config import build
    from immunize.report.terminal import print_run
    from immunize.runner import execute

    run = execute(build(config))
    print_run(run, console=Console())


def _command() -> None:
    _compose_and_run()
    for error in failures[:-1]:
        report(error)
    if failures:
        raise failures[-1]


def main() -> None:
    """The console command; exit code 0 whatever the verdicts, 1 when a run failed, 2 for a bad configuration."""
    sys.exit(reported(_command))
