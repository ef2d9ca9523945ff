"""immunize-export RUN --to FOLDER: the defended model of a run as an ordinary Hugging Face folder with a model card."""

import argparse
import sys
from pathlib import Path

from immunize.cli.errors import reported
from immunize.export import export


def main() -> None:
    """The console command."""
    sys.exit(reported(_command))


def _command() -> None:
    parser = argparse.ArgumentParser(prog="immunize-export", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, multirun/STUDY/RUN_ID")
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    given = parser.parse_args()
    run = export(given.run, to=given.to)
    print(f"{given.to}: the defended model of run {run.id}, with the run's verdicts in its README.md")
