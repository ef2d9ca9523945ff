"""What a study's checks start from: the same measurement in every attack cell, by every seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from immunize.conditions.curves import NotMeasuredError
from immunize.types import EvaluationSet, Score

FEWEST_SEEDS = 3

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicate:
    """What one seed measured in one attack cell."""

    seed: int
    scores: Sequence[Score]
    sets: Sequence[EvaluationSet]


Cells = Mapping[str, Sequence[Replicate]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected(Generic[T]):
    """One thing of every run: `cells` maps each cell that has it for all of `seeds` to its values, in their order.

    `missing` says, in words, what is not there; a gap is in no way filled up.
    """

    seeds: tuple[int, ...]
    cells: Mapping[str, Sequence[T]]
    missing: tuple[str, ...]


def seeds_of(cells: Cells) -> tuple[int, ...]:
    """All seeds of a study, whichever cell they ran in."""
    return tuple(sorted({run.seed for runs in cells.values() for run in runs}))


def collect(cells: Cells, read: Callable[[Replicate], T]) -> Collected[T]:
    """`read` every run; where it raises NotMeasuredError, or a cell lacks a seed, that is said in `missing`.

    What is left must have each seed in each cell. Where something is missing, these are all cells with the seeds that
    have all of them, if there are enough of those (a seed still running), and else the cells that have all seeds.
    """
    seeds = seeds_of(cells)
    found: dict[str, dict[int, T]] = {}
    missing: list[str] = []
    for cell, runs in cells.items():
        by_seed = {run.seed: run for run in runs}
        if len(by_seed) < len(runs):
            raise ValueError(f"cell {cell}: two runs have one seed")
        found[cell] = {}
        for seed in seeds:
            try:
                if seed not in by_seed:
                    raise NotMeasuredError("was not run, or did not finish")
                found[cell][seed] = read(by_seed[seed])
            except NotMeasuredError as error:
                missing.append(f"{cell}, seed {seed}: {error}")
    everywhere = tuple(seed for seed in seeds if all(seed in values for values in found.values()))
    used = everywhere if len(everywhere) >= FEWEST_SEEDS else seeds
    whole = {
        cell: [values[seed] for seed in used] for cell, values in found.items() if all(seed in values for seed in used)
    }
    return Collected(seeds=used, cells=whole, missing=tuple(missing))


def too_few(seeds: Sequence[int]) -> str | None:
    """The reason why nothing can be said of a defense yet, and what to run; None where there are seeds enough."""
    if len(seeds) >= FEWEST_SEEDS:
        return None
    more = [seed for seed in range(len(seeds) + FEWEST_SEEDS) if seed not in seeds][: FEWEST_SEEDS - len(seeds)]
    have = f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({', '.join(map(str, seeds))})"
    return f"{have}, and a verdict on a defense needs {FEWEST_SEEDS}: run seed={','.join(map(str, more))} as well"


def gap(missing: Sequence[str]) -> str:
    """The reason when something is missing."""
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return f"something is missing, and nothing is imputed: {missing[0]}{more}"
