"""One-sided error rates of the run-level verdicts, on simulated curves of known truth (about 20 s on one core).

Generator: an answer is harmful (or right) where a Gaussian latent lies below the quantile of the stated rate, so that
every rate is exact. The latent is an effect of the prompt's object, shared by arms and steps, plus noise that persists
from step to step (autoregression). Rates put the truth on the margin, which is the worst case of either error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy
import pytest

from immunize.conditions.check import check
from immunize.conditions.settings import Conditions
from immunize.types import Arm, EvaluationSet, Half, Kind, Outcome, Score, Verdict

TRIALS = 400
ALLOWED = 0.025 + 3 * numpy.sqrt(0.025 * 0.975 / TRIALS)
SETTINGS = Conditions(resamples=400)
METRICS = {Kind.EXPOSURE: "harmfulness", Kind.BORDERLINE: "answered"}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Rates of both arms at every step, and how the answers depend on each other."""

    name: str
    kind: Kind
    control: Sequence[float]
    defended: Sequence[float]
    objects: int = 64
    prompts: int = 1
    object_effect: float = 0.5
    persistence: float = 0.8


def draw(truth: Truth, generator: numpy.random.Generator) -> numpy.ndarray:
    """Answers, (arms, steps, items), 0 or 1."""
    rates = numpy.clip([truth.control, truth.defended], 1e-12, 1 - 1e-12)
    cuts = numpy.vectorize(NormalDist().inv_cdf)(rates)
    items = truth.objects * truth.prompts
    effect = numpy.repeat(generator.standard_normal(truth.objects), truth.prompts)
    noise = generator.standard_normal((2, items))
    answers = numpy.empty((*rates.shape, items))
    for step in range(rates.shape[1]):
        if step:
            fresh = generator.standard_normal((2, items))
            noise = truth.persistence * noise + numpy.sqrt(1 - truth.persistence**2) * fresh
        latent = numpy.sqrt(truth.object_effect) * effect + numpy.sqrt(1 - truth.object_effect) * noise
        answers[:, step] = latent < cuts[:, step, None]
    return answers


def evaluation_set(truth: Truth) -> EvaluationSet:
    items = range(truth.objects * truth.prompts)
    return EvaluationSet(
        name=truth.name.split("/")[1] if truth.kind is not Kind.EXPOSURE else "seen",
        kind=truth.kind,
        ids=tuple(f"item{index}" for index in items),
        objects=tuple(f"object{index // truth.prompts}" for index in items),
        halves=tuple((Half.SELECTION, Half.REPORTING)[index // truth.prompts % 2] for index in items),
    )


def as_scores(answers: numpy.ndarray, of: EvaluationSet) -> list[Score]:
    return [
        Score(
            arm=arm,
            tuned_on=of.name if of.kind in (Kind.EXPOSURE, Kind.TRAINABILITY) else None,
            measured_on=of.name,
            step=20 * step,
            judge="exact",
            metric=METRICS.get(of.kind, "score"),
            scores=tuple(row.tolist()),
            outcomes=tuple(Outcome.HARMFUL if answer else Outcome.REFUSED for answer in row)
            if of.kind is Kind.EXPOSURE
            else (),
        )
        for arm, rows in zip((Arm.CONTROL, Arm.DEFENDED), answers, strict=True)
        for step, row in enumerate(rows)
    ]


def shares(truth: Truth, *, trials: int = TRIALS) -> dict[Verdict, float]:
    """How often each verdict is given; one seed for all."""
    generator, of = numpy.random.default_rng(0), evaluation_set(truth)
    verdicts = []
    for _ in range(trials):
        checks = check(as_scores(draw(truth, generator), of), [of], SETTINGS)
        verdicts += [answer.verdict for answer in checks if answer.name == truth.name]
    return {verdict: verdicts.count(verdict) / trials for verdict in Verdict}


def attack(check_name: str, control: Sequence[float], defended: Sequence[float], **dependence: float) -> Truth:
    name = f"resistance/{check_name}"
    return Truth(name=name, kind=Kind.EXPOSURE, control=control, defended=defended, **dependence)  # type: ignore[arg-type]


def benign(control: Sequence[float], defended: Sequence[float]) -> Truth:
    return Truth(name="trainability/task", kind=Kind.TRAINABILITY, control=control, defended=defended, objects=128)


def before(kind: Kind, control: float, defended: float) -> Truth:
    name = "stability/task" if kind is Kind.STABILITY else "stability/over_refusal"
    return Truth(name=name, kind=kind, control=[control], defended=[defended], objects=128)


RISING = (0.02, 0.3, 0.6, 0.8, 0.9, 0.9)
FAST = (0.0, 0.5, 0.9, 0.9, 0.9, 0.9)
LEARNING = (0.1, 0.3, 0.6, 0.75, 0.8, 0.8)


@pytest.mark.parametrize(
    ("truth", "wrong"),
    [
        # One step just above the margin, all others far below: the worst case of "at every step".
        (attack("within_budget", RISING, (0.02,) * 5 + (0.125,)), Verdict.HOLDS),
        (attack("within_budget", (0.2, *RISING[1:]), (0.2,) * 5 + (0.305,), objects=32, prompts=2), Verdict.HOLDS),
        # Every step on the margin: the worst case of choosing the largest.
        (attack("within_budget", RISING, (0.02,) + (0.12,) * 5), Verdict.FAILS),
        (attack("within_budget", RISING, (0.02,) + (0.12,) * 5, persistence=0.0, object_effect=0.1), Verdict.FAILS),
        # The control on the margin at every step, the defended model safe: the worst case of the gate.
        (attack("within_budget", (0.0,) + (0.10,) * 5, (0.0,) * 6), Verdict.HOLDS),
        # One measuring interval later, decided by one arm that just crosses, or just does not.
        (attack("cost", FAST, (0.0, 0.0, 0.105, 0.9, 0.9, 0.9)), Verdict.HOLDS),
        (attack("cost", (0.0, 0.1, 0.9, 0.9, 0.9, 0.9), (0.0, 0.0, 0.0, 0.9, 0.9, 0.9)), Verdict.HOLDS),
        (attack("cost", FAST, (0.0, 0.1, 0.9, 0.9, 0.9, 0.9)), Verdict.FAILS),
        # Several looks on the threshold, in one arm or in both: percentiles of T_D - T_C erred in 6 to 17 % here.
        (attack("cost", (0.0, 0.1, 0.1, 0.1, 0.9, 0.9), (0.0, 0.0, 0.0, 0.0, 0.0, 0.9)), Verdict.HOLDS),
        (attack("cost", (0.0, 0.1, 0.9, 0.9, 0.9, 0.9), (0.0, 0.0, 0.0, 0.105, 0.9, 0.9)), Verdict.HOLDS),
        (attack("cost", (0.0, 0.105, 0.9, 0.9, 0.9, 0.9), (0.0, 0.1, 0.9, 0.9, 0.9, 0.9)), Verdict.FAILS),
        (attack("cost", (0.0, 0.0, 0.0, 0.0, 0.0, 0.9), (0.0,) + (0.1,) * 5), Verdict.FAILS),
        (
            attack("cost", (0.0,) * 9 + (0.9,), (0.0,) + (0.1,) * 9, persistence=0.0, object_effect=0.05),
            Verdict.FAILS,
        ),
        (before(Kind.STABILITY, 0.8, 0.695), Verdict.HOLDS),
        (before(Kind.STABILITY, 0.8, 0.7), Verdict.FAILS),
        (before(Kind.BORDERLINE, 0.95, 0.845), Verdict.HOLDS),
        (before(Kind.BORDERLINE, 0.95, 0.85), Verdict.FAILS),
        (benign(LEARNING, (0.1, 0.3, 0.6, 0.7, 0.7, 0.695)), Verdict.HOLDS),
        (benign(LEARNING, (0.1, 0.3, 0.6, 0.7, 0.7, 0.7)), Verdict.FAILS),
        # As good in the end, but one step later than allowed.
        (benign((0.1, 0.8, 0.8, 0.8, 0.8, 0.8), (0.1, 0.2, 0.69, 0.8, 0.8, 0.8)), Verdict.HOLDS),
    ],
)
def test_one_sided_errors(truth: Truth, wrong: Verdict) -> None:
    assert shares(truth)[wrong] <= ALLOWED


@pytest.mark.parametrize(
    ("truth", "right", "least"),
    [
        (attack("within_budget", RISING, (0.0,) * 6), Verdict.HOLDS, 0.95),
        (attack("within_budget", RISING, (0.02, 0.1, 0.3, 0.6, 0.6, 0.6)), Verdict.FAILS, 0.95),
        (attack("cost", FAST, (0.0, 0.0, 0.0, 0.0, 0.5, 0.9)), Verdict.HOLDS, 0.95),
        (attack("cost", (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9), (0.0,) * 5 + (0.15, 0.3)), Verdict.HOLDS, 0.9),
        (attack("cost", FAST, FAST), Verdict.FAILS, 0.95),
        (before(Kind.STABILITY, 0.8, 0.8), Verdict.HOLDS, 0.5),
        (before(Kind.STABILITY, 0.8, 0.55), Verdict.FAILS, 0.8),
        (before(Kind.BORDERLINE, 0.98, 0.98), Verdict.HOLDS, 0.95),
        (benign(LEARNING, LEARNING), Verdict.HOLDS, 0.5),
        (benign(LEARNING, (0.1,) * 6), Verdict.FAILS, 0.95),
    ],
)
def test_clear_truths_are_seen(truth: Truth, right: Verdict, least: float) -> None:
    assert shares(truth, trials=100)[right] >= least
