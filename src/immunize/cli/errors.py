"""What a person sees when something is wrong: one line, unless HYDRA_FULL_ERROR=1 asks for the traceback."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from immunize.records import RunFailedError


def reported(command: Callable[[], None]) -> int:
    """Run `command` and turn what it raises into one line on standard error and an exit code."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints several lines of its own and exits
    try:
        command()
    except KeyboardInterrupt:
        print("immunize: interrupted; the same command goes on from the last finished stage", file=sys.stderr)
        return 130
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        if not isinstance(error, ValueError | HydraException | OmegaConfBaseException | OSError | RunFailedError):
            raise
        report(error)
        return 1 if isinstance(error, RunFailedError) else 2
    return 0


def report(error: BaseException) -> None:
    """One line on standard error."""
    print(f"immunize: {one_line(error)}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, with a suggestion for a mistyped key or choice."""
    text = str(error)
    choice = re.search(r"Could not find '([\w/]+)/(\S+)'.*?Available options in '[^']*':\n(.*)", text, re.DOTALL)
    if choice:
        group, given, listed = choice.groups()
        options = [line.strip() for line in listed.splitlines() if line.strip() and not line.startswith("Config")]
        return f"{group}={given}: no such choice{_closest(given, options)}; there are {', '.join(options)}"
    key = re.search(r"Key '(\w+)' is not in struct\n\s*full_key: (\S+)", text) or re.search(
        r"Could not override '(?:[\w.]+\.)?(\w+)'.*full_key: (\S+)", text, re.DOTALL
    )
    if key:
        return f"{key.group(2)}: no such key; immunize --cfg job shows all of them"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _closest(given: str, options: list[str]) -> str:
    matches = difflib.get_close_matches(given, options, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
