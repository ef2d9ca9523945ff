"""A grid of ten training steps: a random model of three layers, 32 lines of data, one exposure."""

from pathlib import Path

from tests.test_local_run import overrides


def tiny(sources: tuple[Path, Path], root: Path) -> list[str]:
    """Overrides; `sources` are the model's folder and the data file, as the fixture `sources` makes them."""
    return [
        *overrides(*sources, root),
        "study=grid",
        "split.exposures=[seen]",
        "budget.measurements=1",
        "conditions.resamples=200",
        "runtime.threads=1",
    ]
