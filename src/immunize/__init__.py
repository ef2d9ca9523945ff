"""Does a defense against harmful fine-tuning meet the four immunization conditions?

From Python: `immunize.run` runs what the command would run, `immunize.load_study` reads a study into pandas frames.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunize.frames import Frames
    from immunize.records import Run


def run(overrides: "list[str] | None" = None) -> "Run":
    """Run what `immunize *overrides` would run, or read it back when it is finished.

    Raises ValueError for a bad configuration and `immunize.records.RunFailedError` when a stage fails.
    """
    from immunize.cli.errors import one_line
    from immunize.config import build, load
    from immunize.runner import execute

    try:
        cell = build(load(overrides or []))
    except ValueError:
        raise
    except Exception as error:  # a mistyped key or choice, which Hydra has a class of its own for
        raise ValueError(one_line(error)) from error
    return execute(cell)


def load_study(path: "str | Path") -> "Frames":
    """Checks, curves and scores of a study as tidy frames; see `immunize.frames.Frames`."""
    from immunize.frames import load_study

    return load_study(path)
