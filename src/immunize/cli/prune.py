"""immunize-prune [--yes] [runtime.root=multirun]: list the stages that no run refers to, and remove them with --yes."""

import argparse
import sys
from pathlib import Path

from immunize.cli.errors import reported
from immunize.prune import remove, unused_stages


def main() -> None:
    """The console command; without --yes nothing is removed."""
    sys.exit(reported(_command))


def _command() -> None:
    parser = argparse.ArgumentParser(prog="immunize-prune", description=__doc__)
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument("root", nargs="?", default="runtime.root=multirun", help="runtime.root=FOLDER")
    given = parser.parse_args()
    root = Path(given.root.removeprefix("runtime.root="))
    found = unused_stages(root)
    for item in found:
        state = "" if not given.yes else "  removed" if remove(item) else "  kept: a worker is at work on it"
        print(f"{item.size / 1e6:10.1f} MB  {item.name}{state}")
    total = sum(item.size for item in found) / 1e6
    advice = "" if given.yes or not found else "; --yes removes them"
    print(f"{len(found)} stages that no run in {root} refers to, {total:.1f} MB{advice}")
