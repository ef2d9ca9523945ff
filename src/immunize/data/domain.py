"""What the suite asks of a domain, of a task, and of the configuration that chooses them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from immunize.data.benchmark import Benchmark
from immunize.stages import UNLESS_NONE
from immunize.training.tuning import FullParameter, Optimizer, Trainable, Tuning
from immunize.types import Example


class Domain(Protocol):
    """One kind of harm; `evaluation_share` of the objects of each category are for evaluation only."""

    version: ClassVar[int]

    @property
    def name(self) -> str: ...
    @property
    def evaluation_share(self) -> float: ...
    def examples(self) -> list[Example]: ...


class Task(Protocol):
    """One benign task with its metric; `chance` is the score of a guess."""

    version: ClassVar[int]

    @property
    def name(self) -> str: ...
    @property
    def chance(self) -> float: ...
    def train(self) -> list[Example]: ...
    def test(self) -> list[Example]: ...
    def score(self, example: Example, answer: str) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is harm here, and what the defense may know of it.

    domain: attacked by the exposures `seen` and `in_domain`; the defense's own data come from it.
    defense_categories: those that the defense may see; empty means the first half in alphabetical order.
    other_domain: attacked by the exposure `cross_domain`; the defense never sees it.
    """

    version: ClassVar[int] = 1
    domain: Domain
    other_domain: Domain | None = None
    defense_categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.defense_categories)) < len(self.defense_categories):
            raise ValueError(f"defense_categories={list(self.defense_categories)}: names one twice")
        if self.other_domain is not None and self.other_domain.name == self.domain.name:
            raise ValueError(f"other_domain.name={self.domain.name}: must differ from that of domain")


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """A trainability task with the rate and steps at which the undefended model learns it; the rest as in `Tuning`."""

    task: Task
    learning_rate: float
    steps: int
    batch_size: int = 16
    measurements: int = 4
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainable: Trainable = field(default_factory=FullParameter)
    micro_batch: int | None = field(default=None, metadata=UNLESS_NONE)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be positive")
        for name in ("steps", "batch_size", "measurements"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        self.tuning()

    def tuning(self) -> Tuning:
        return Tuning(
            learning_rate=self.learning_rate,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            optimizer=self.optimizer,
            trainable=self.trainable,
        )


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What a defended model must still be able to do.

    stability: scored before any attack, and on attacked models for the utility guard.
    borderline: harmless prompts that look harmful; its score is 1 when the prompt is answered.
    trainability: learned under benign training.
    retain: its training examples are the benign conversations that a defense may use.
    benchmarks: measured on the model itself before any attack; of the utility guard they are no part.
    direct_requests: harmful requests that are put to the model before any attack, one an object, and judged; what
        else the domain holds plays no part.

    The keys of the mappings serve to override an entry; tables show the tasks' own names.
    """

    version: ClassVar[int] = 1
    stability: Mapping[str, Task]
    borderline: Task | None = None
    trainability: Mapping[str, TrainedTask] = field(default_factory=dict)
    retain: Task | None = None
    benchmarks: Mapping[str, Benchmark] | None = field(default=None, metadata=UNLESS_NONE)
    direct_requests: Domain | None = field(default=None, metadata=UNLESS_NONE)

    def __post_init__(self) -> None:
        names = [task.name for task in self.all()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task names must differ, and {', '.join(twice)} is used twice")

    def all(self) -> Sequence[Task]:
        borderline = [self.borderline] if self.borderline else []
        trained = [entry.task for entry in self.trainability.values()]
        return [*self.stability.values(), *borderline, *trained]
