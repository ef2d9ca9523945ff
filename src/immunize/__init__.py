"""Does a defense against harmful fine-tuning meet the four immunization conditions? From Python: `immunize.run`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunize.records import Run


def run(overrides: "list[str] | None" = None) -> "Run":
    """Run what `immunize *overrides` would run, or read it back when it is finished.

    Raises ValueError for a bad configuration and `immunize.records.RunFailedError` when a stage fails.
    """
    from immunize.config import build, load
    from immunize.runner import execute

    return execute(build(load(overrides or [])))
