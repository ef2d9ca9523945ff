"""One-sided error rates of the study-level verdicts, on simulated grids of known truth (about 20 s on one core).

Generator: as in test_conditions_errors, an answer is harmful where a Gaussian latent lies below the quantile of the
stated rate; the latent has an effect of the object, shared by seeds, cells, arms and steps, a seed's own shift of
each arm and cell (or, with `shared`, one shift in all cells), and noise that persists from step to step. Stated rates
are those over seeds.
`IMMUNIZE_TRIALS=2000 pytest tests/test_study_conditions_errors.py -s` prints what a long simulation finds.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy
import pytest

from immunize.conditions.settings import Conditions
from immunize.conditions.study import Replicate, check_study
from immunize.types import Kind, Verdict
from tests.test_conditions_errors import FAST, LEARNING, RISING, Truth, as_scores, evaluation_set

TRIALS = int(os.environ.get("IMMUNIZE_TRIALS", "100"))
ALLOWED = 0.025 + 3 * numpy.sqrt(0.025 * 0.975 / TRIALS)
SETTINGS = Conditions(resamples=200)
OBJECT_EFFECT, PERSISTENCE = 0.5, 0.8
Curve = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The rates of both arms in every cell; `seed_effect` is the standard deviation of a seed's shift of the latent."""

    name: str
    cells: Sequence[tuple[Curve, Curve]]
    kind: Kind = Kind.EXPOSURE
    objects: int = 64
    seed_effect: float = 0.3
    shared: bool = False


def draw(grid: Grid, seeds: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """Answers, (cells, seeds, arms, steps, items), 0 or 1."""
    rates = numpy.clip(numpy.asarray(grid.cells), 1e-12, 1 - 1e-12)  # (cells, arms, steps)
    cuts = numpy.vectorize(NormalDist().inv_cdf)(rates) * numpy.sqrt(1 + grid.seed_effect**2)
    shape = (len(grid.cells), seeds, 2)
    shared = numpy.sqrt(OBJECT_EFFECT) * generator.standard_normal(grid.objects)
    own = (1, *shape[1:], 1) if grid.shared else (*shape, 1)
    shift = grid.seed_effect * generator.standard_normal(own)
    noise = generator.standard_normal((*shape, grid.objects))
    answers = numpy.empty((*shape, rates.shape[-1], grid.objects))
    for step in range(rates.shape[-1]):
        if step:
            fresh = generator.standard_normal(noise.shape)
            noise = PERSISTENCE * noise + numpy.sqrt(1 - PERSISTENCE**2) * fresh
        latent = shared + numpy.sqrt(1 - OBJECT_EFFECT) * noise + shift
        answers[..., step, :] = latent < cuts[:, None, :, step, None]
    return answers


def shares(grid: Grid, seeds: int) -> dict[Verdict, float]:
    """How often each verdict is given."""
    generator = numpy.random.default_rng(0)
    of = evaluation_set(Truth(name=grid.name, kind=grid.kind, control=(), defended=(), objects=grid.objects))
    verdicts = []
    for _ in range(TRIALS):
        answers = draw(grid, seeds, generator)
        cells = {
            str(cell): [
                Replicate(seed=seed, scores=as_scores(answers[cell, seed], of), sets=[of]) for seed in range(seeds)
            ]
            for cell in range(len(grid.cells))
        }
        verdicts += [item.check.verdict for item in check_study(cells, SETTINGS) if item.check.name == grid.name]
    found = {verdict: verdicts.count(verdict) / TRIALS for verdict in Verdict}
    print(f"{grid.name}, {seeds} seeds, {grid.cells}, seed effect {grid.seed_effect}: {found}")
    return found


def attack(check: str, *cells: tuple[Curve, Curve], seed_effect: float = 0.3, shared: bool = False) -> Grid:
    return Grid(name=f"resistance/{check}", cells=cells, seed_effect=seed_effect, shared=shared)


def benign(control: Curve, defended: Curve, seed_effect: float = 0.1) -> Grid:
    cells = [(control, defended)]
    return Grid(name="trainability/task", kind=Kind.TRAINABILITY, cells=cells, objects=128, seed_effect=seed_effect)


def before(control: float, defended: float, seed_effect: float = 0.1) -> Grid:
    cells = [((control,), (defended,))]
    return Grid(name="stability/task", kind=Kind.STABILITY, cells=cells, objects=128, seed_effect=seed_effect)


SAFE = (0.0,) * 6
HOVERING = (0.0,) + (0.1,) * 5
LATE = (0.0,) * 5 + (0.9,)
WRONG = [
    # One step of one cell just above the margin; every step on it; the control on it at every step of both cells.
    (attack("within_budget", (RISING, (0.02,) * 5 + (0.125,)), (RISING, (0.02,) * 6)), Verdict.HOLDS),
    (attack("within_budget", (RISING, (0.02,) + (0.12,) * 5), seed_effect=0.0), Verdict.FAILS),
    (attack("within_budget", *[(RISING, (0.02,) + (0.12,) * 5)] * 3), Verdict.FAILS),
    (attack("within_budget", *[((0.0,) + (0.10,) * 5, SAFE)] * 2), Verdict.HOLDS),
    # A curve that hovers at the threshold: percentiles of the difference of first crossings err in 5 to 61 %.
    (attack("cost", ((0.0, 0.1, 0.1, 0.1, 0.9, 0.9), (0.0, 0.0, 0.0, 0.0, 0.0, 0.9))), Verdict.HOLDS),
    (attack("cost", ((0.0, 0.1, 0.9, 0.9, 0.9, 0.9), (0.0, 0.0, 0.0, 0.105, 0.9, 0.9))), Verdict.HOLDS),
    (attack("cost", (FAST, (0.0, 0.0, 0.105, 0.9, 0.9, 0.9)), seed_effect=0.0), Verdict.HOLDS),
    (attack("cost", ((0.0, 0.0, 0.0, 0.0, 0.0, 0.9), (0.0,) + (0.1,) * 5)), Verdict.FAILS),
    (attack("cost", *[((0.0, 0.105, 0.9, 0.9, 0.9, 0.9), (0.0, 0.1, 0.9, 0.9, 0.9, 0.9))] * 2), Verdict.FAILS),
    # Many attacks of which none surely breaks anything: pointwise bounds without a choice of cells err in 3 to 9 %.
    (attack("cost", ((0.0, 0.1, 0.1, 0.1, 0.9, 0.9), LATE), *[(HOVERING, SAFE)] * 9), Verdict.HOLDS),
    (attack("cost", *[(LATE, HOVERING)] * 10, shared=True), Verdict.FAILS),
    # Both arms may err: the control on the threshold before it crosses, the defended one just above it, and back.
    (attack("cost", ((0.0, 0.1, 0.1, 0.9, 0.9, 0.9), (0.0, 0.0, 0.0, 0.0, 0.105, 0.0))), Verdict.HOLDS),
    (before(0.8, 0.695), Verdict.HOLDS),
    (before(0.8, 0.7), Verdict.FAILS),
    (benign(LEARNING, (0.1, 0.3, 0.6, 0.7, 0.7, 0.695)), Verdict.HOLDS),
    (benign(LEARNING, (0.1, 0.3, 0.6, 0.7, 0.7, 0.7)), Verdict.FAILS),
    (benign((0.1, 0.8, 0.8, 0.8, 0.8, 0.8), (0.1, 0.2, 0.69, 0.8, 0.8, 0.8)), Verdict.HOLDS),
]


@pytest.mark.parametrize(("grid", "wrong"), WRONG)
@pytest.mark.parametrize("seeds", [3, 5])
def test_one_sided_errors(grid: Grid, wrong: Verdict, seeds: int) -> None:
    assert shares(grid, seeds)[wrong] <= ALLOWED


@pytest.mark.parametrize(
    ("grid", "right", "least"),
    [
        (attack("within_budget", (RISING, SAFE), (FAST, SAFE)), Verdict.HOLDS, 0.9),
        (attack("within_budget", (RISING, (0.02, 0.1, 0.5, 0.9, 0.9, 0.9)), (RISING, SAFE)), Verdict.FAILS, 0.8),
        (attack("cost", (FAST, (0.0, 0.0, 0.0, 0.0, 0.5, 0.9))), Verdict.HOLDS, 0.9),
        (attack("cost", *[((0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9), (0.0,) * 5 + (0.15, 0.3))] * 3), Verdict.HOLDS, 0.6),
        (attack("cost", ((0.0, 0.8, 0.9, 0.9), (0.0, 0.8, 0.9, 0.9))), Verdict.FAILS, 0.8),
        (before(0.9, 0.9, seed_effect=0.05), Verdict.HOLDS, 0.5),
        (before(0.8, 0.4), Verdict.FAILS, 0.8),
        (benign(LEARNING, (0.1,) * 6), Verdict.FAILS, 0.9),
    ],
)
def test_clear_truths_are_seen(grid: Grid, right: Verdict, least: float) -> None:
    assert shares(grid, 3)[right] >= least


def test_one_seed_never_decides() -> None:
    for grid, _ in WRONG[:2]:
        assert shares(grid, 1)[Verdict.UNDETERMINED] == 1.0
