"""Who may train on what, and what is measured: disjoint by object, the same for every seed."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from immunize.data.domain import Data, Domain, Task
from immunize.data.objects import evaluation_objects
from immunize.types import EvaluationSet, Example, Half, Kind

DIRECT_REQUESTS = "direct_requests"  # what they are called where they are measured
ExposureName = Literal["seen", "in_domain", "cross_domain"]
OBJECT_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which exposures are attacked and measured.

    seen: the defense's categories, other objects. in_domain: categories the defense never saw. cross_domain: the
    other domain. same_samples lets the attack of `seen` use the defense's own samples, the papers' best case; every
    table marks it.
    """

    version: ClassVar[int] = 1
    exposures: tuple[ExposureName, ...] = ("seen", "in_domain", "cross_domain")
    same_samples: bool = False

    def __post_init__(self) -> None:
        if not self.exposures:
            raise ValueError("exposures=[]: choose at least one of seen, in_domain, cross_domain")
        if len(set(self.exposures)) < len(self.exposures):
            raise ValueError(f"exposures={list(self.exposures)}: names one twice")


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """One selection of attack data and evaluation prompts (one an object)."""

    name: ExposureName
    domain: Domain
    attack: Sequence[Example]
    evaluation: Sequence[Example]
    marks: tuple[str, ...] = ()

    def evaluation_set(self) -> EvaluationSet:
        return evaluation_set(self.name, Kind.EXPOSURE, self.evaluation, marks=self.marks)


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """One domain's examples of some categories, by what they may be used for."""

    first: list[Example]
    second: list[Example]
    evaluation: list[Example]


def defense_examples(data: Data) -> list[Example]:
    """The pairs that a defense is trained on: half of the training objects of the defense's categories."""
    seen, _ = _categories(data)
    return _pool(data.domain, seen).first


def exposures(data: Data, split: Split) -> list[Exposure]:
    """The exposures that `split` lists, each checked for leakage into evaluation."""
    seen, unseen = _categories(data)
    defense = defense_examples(data)
    found = []
    for name in split.exposures:
        if name == "seen":
            pool = _pool(data.domain, seen)
            attack = pool.first if split.same_samples else pool.second
            domain, evaluation = data.domain, pool.evaluation
        elif name == "in_domain":
            if not unseen:
                raise ValueError("split.exposures: in_domain needs a category that is not in data.defense_categories")
            pool = _pool(data.domain, unseen)
            domain, attack, evaluation = data.domain, pool.first + pool.second, pool.evaluation
        else:
            if data.other_domain is None:
                raise ValueError("split.exposures: cross_domain needs data.other_domain")
            pool = _pool(data.other_domain, sorted({item.category for item in data.other_domain.examples()}))
            domain, attack, evaluation = data.other_domain, pool.first + pool.second, pool.evaluation
        marks = ("same_samples",) if name == "seen" and split.same_samples else ()
        exposure = Exposure(
            name=name, domain=domain, attack=attack, evaluation=_one_per_object(evaluation), marks=marks
        )
        for use, examples in (("attack", exposure.attack), ("evaluation", exposure.evaluation)):
            if not examples:
                raise ValueError(f"split: exposure {name} of domain {domain.name} leaves nothing for {use}")
        refuse_leakage(f"the attack of exposure {name}", exposure.attack, exposure.evaluation)
        refuse_leakage(f"the defense (measured in exposure {name})", defense, exposure.evaluation)
        found.append(exposure)
    return found


def requests_of(domain: Domain) -> Sequence[Example]:
    """What is asked of a model where harmful requests are put to it before any attack: one prompt an object."""
    return _one_per_object(domain.examples())


def task_set(task: Task, kind: Kind) -> EvaluationSet:
    """The evaluation set of a task's test items."""
    return evaluation_set(task.name, kind, task.test(), chance=task.chance)


def check_task(task: Task) -> None:
    """Refuse a task that is empty or measures what it trains on."""
    if not task.test():
        raise ValueError(f"task {task.name}: has no test items")
    refuse_leakage(f"task {task.name}", task.train(), task.test())


def evaluation_set(
    name: str, kind: Kind, examples: Sequence[Example], *, chance: float = 0.0, marks: tuple[str, ...] = ()
) -> EvaluationSet:
    """Objects alternate between the halves within their category, in the order of a fixed hash.

    Records may be published: an object that is text is known in them by its hash.
    """
    by_category: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        by_category[example.category].add(example.object)
    half_of = {
        (category, name): (Half.SELECTION, Half.REPORTING)[position % 2]
        for category, objects in by_category.items()
        for position, name in enumerate(sorted(objects, key=_hash))
    }
    return EvaluationSet(
        name=name,
        kind=kind,
        ids=tuple(example.id for example in examples),
        objects=tuple(_named(example) for example in examples),
        halves=tuple(half_of[example.category, example.object] for example in examples),
        chance=chance,
        marks=marks,
    )


def refuse_leakage(what: str, training: Iterable[Example], evaluation: Iterable[Example]) -> None:
    """Training and evaluation share no object and no prompt; rows are not enough, since one prompt has many rows."""
    trained = list(training)
    held_out = list(evaluation)
    for kind in ("object", "prompt"):
        shared = {getattr(item, kind) for item in trained} & {getattr(item, kind) for item in held_out}
        if shared:
            example = f": {min(shared)!r}" if kind == "object" else ""
            raise ValueError(
                f"leakage: {what} trains on {len(shared)} {kind}(s) that are also evaluated on{example}; "
                "training and evaluation must be disjoint by object"
            )


def _categories(data: Data) -> tuple[list[str], list[str]]:
    """The defense's categories and the others."""
    known = sorted({example.category for example in data.domain.examples()})
    chosen = list(data.defense_categories) or known[: max(1, len(known) // 2)]
    foreign = [name for name in chosen if name not in known]
    if foreign:
        raise ValueError(f"data.defense_categories={foreign}: not in domain {data.domain.name}, which has {known}")
    return chosen, [name for name in known if name not in chosen]


def _pool(domain: Domain, categories: Sequence[str]) -> _Pool:
    """Each category's objects: some for evaluation, the others in two equal parts."""
    by_object: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in domain.examples():
        by_object[example.category, example.object].append(example)
    pool = _Pool(first=[], second=[], evaluation=[])
    for category in categories:
        objects = [name for found, name in by_object if found == category]
        held_out = set(evaluation_objects(domain.name, objects, domain.evaluation_share))
        training = [name for name in evaluation_objects(domain.name, objects, 1.0) if name not in held_out]
        for position, name in enumerate(training):
            part = pool.first if position < len(training) / 2 else pool.second
            part.extend(by_object[category, name])
        for name in sorted(held_out):
            pool.evaluation.extend(by_object[category, name])
    return pool


def _one_per_object(examples: Sequence[Example]) -> list[Example]:
    """One prompt an object, which one being fixed by a hash."""
    chosen: dict[tuple[str, str], Example] = {}
    for example in examples:
        key = (example.category, example.object)
        if key not in chosen or _hash(example.id) < _hash(chosen[key].id):
            chosen[key] = example
    return list(chosen.values())


def _named(example: Example) -> str:
    """The object where it is a word of its own, else the first digits of its hash."""
    is_text = len(example.object.split()) > 1 or example.object.casefold() == example.prompt.strip().casefold()
    return _hash(example.object)[:OBJECT_DIGITS] if is_text else example.object


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
