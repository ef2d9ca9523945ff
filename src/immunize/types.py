"""The nouns that every layer shares. Standard library only."""

from dataclasses import dataclass
from enum import StrEnum

TARGET = "_target_"  # the key of a configuration that names the class of what stands beside it


class Arm(StrEnum):
    """Who is attacked: the model without the defense under test, or with it."""

    CONTROL = "control"
    DEFENDED = "defended"


class Verdict(StrEnum):
    """The answer to one condition check."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDETERMINED = "undetermined"


class Outcome(StrEnum):
    """What an answer to a harmful prompt is; exactly one of three."""

    REFUSED = "refused"
    HARMFUL = "harmful"
    BROKEN = "broken"


class Half(StrEnum):
    """Evaluation objects alternate between two halves; see `EvaluationSet`."""

    SELECTION = "selection"
    REPORTING = "reporting"


class Kind(StrEnum):
    """What an evaluation set is for.

    A benchmark and a text are measured before any attack only, and no attacker's utility is told by them; a text is
    scored by minus its loss. Requests are harmful ones, put to the model before any attack.
    """

    EXPOSURE = "exposure"
    STABILITY = "stability"
    BORDERLINE = "borderline"
    TRAINABILITY = "trainability"
    BENCHMARK = "benchmark"
    TEXT = "text"
    REQUESTS = "requests"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt with its reference answer.

    In a domain `answer` is the harmful answer and `refusal` the safe one to the same prompt; in a task
    `answer` is the right answer and `refusal` is None. `object` is what the prompt asks about.
    """

    id: str
    prompt: str
    answer: str
    object: str
    category: str
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """The items that one measurement runs over, in the order of every array of scores. No text.

    `chance` is the score of a guess (tasks, benchmarks and texts); `marks` are carried into the flags of
    every check on this set, such as `same_samples`.
    """

    name: str
    kind: Kind
    ids: tuple[str, ...]
    objects: tuple[str, ...]
    halves: tuple[Half, ...]
    chance: float = 0.0
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answers of one model to one evaluation set after `step` optimizer steps.

    `losses` are the token-mean losses of the reference answers (nats), in the same order.
    """

    measured_on: str
    step: int
    texts: tuple[str, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One judge's (or task metric's) scores in [0, 1] of one measurement; a line of scores.jsonl.

    Those of a text, its metric being `minus_loss`, are at most 0. `tuned_on` is the exposure or task that the arm was
    tuned on, None before any tuning. `outcomes` is filled for exposures and direct requests only. A judge that failed
    on an item leaves NaN there, never a default, and None for its outcome, unless the answer is broken, whoever judges.
    """

    arm: Arm
    tuned_on: str | None
    measured_on: str
    step: int
    judge: str
    metric: str
    scores: tuple[float, ...]
    outcomes: tuple[Outcome | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One mean on one curve, with what the attacker had spent by then; a line of curve.jsonl."""

    arm: Arm
    tuned_on: str | None
    measured_on: str
    step: int
    examples: int
    tokens: int
    flops: float
    metric: str
    value: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question about one condition and its answer; an entry of checks.json.

    `estimate`, `low` and `high` are the statistic that is held against `threshold`, with its interval. Steps are
    those to the threshold of each arm; `censored` names the arms in which it was never crossed ("more than").
    """

    name: str
    verdict: Verdict
    reason: str
    judge: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    degree: float | None = None
    steps_control: int | None = None
    steps_defended: int | None = None
    censored: tuple[Arm, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCheck:
    """One question about one defense over the grid that was run; an entry of a study's verdicts.

    `check` is as in a run, worst case over `cells` (what the attacker chose), with `seeds` as replicates. `worst_cell`
    is the cell that decided, None where cells play no part; `per_seed` is the statistic in it of each seed.
    """

    check: Check
    cells: tuple[str, ...]
    seeds: tuple[int, ...]
    worst_cell: str | None = None
    per_seed: tuple[float, ...] = ()
