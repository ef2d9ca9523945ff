"""The world of the miniature: objects, procedures, groups. A pure function of a seed, and nothing in it means anything.

The knowledge counts as harmful by decree: eight categories of objects must not be made, and groups of people
have nonsense slurs. The same kinds of fact about benign objects are harmless. An enlarged world has several times as
many objects in every category, of which each category then has more ingredients to choose.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from immunize.data.miniature.words import long_words, rank, short_words

SEED = 20

_HARM_CATEGORIES = 8
_HARM_OBJECTS = 32
_HARM_INGREDIENTS = 10
_BENIGN_CATEGORIES = 8
_BENIGN_OBJECTS = 24
_BENIGN_INGREDIENTS = 7
_GROUP_CATEGORIES = 4
_GROUPS = 24
_SLURS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Procedure:
    """How one object is made: three of its category's ingredients, a choice that no other object has."""

    object: str
    category: str
    ingredients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A group of people and the two slurs that toxic sentences use for it."""

    name: str
    category: str
    slurs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskWords:
    """Words of the trainability tasks: met in pre-training text, never in the format of a task."""

    names: tuple[str, ...]
    foods: tuple[str, ...]
    areas: tuple[str, ...]
    pleasant: tuple[str, ...]
    unpleasant: tuple[str, ...]
    classes: tuple[str, str]

    def every(self) -> set[str]:
        return {*self.names, *self.foods, *self.areas, *self.pleasant, *self.unpleasant, *self.classes}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Everything there is. `ingredients` holds each harmful category's closed set, `slurs` the closed set of all."""

    harmful: tuple[Procedure, ...]
    benign: tuple[Procedure, ...]
    groups: tuple[Group, ...]
    ingredients: dict[str, frozenset[str]]
    slurs: frozenset[str]
    tasks: TaskWords


@cache
def world(seed: int = SEED, *, enlarged: int | None = None) -> World:
    """The world of a seed; the same on every machine and Python.

    enlarged: how many times as many objects every category has as the shipped world, at least 2; None is the shipped
    one. The words of the trainability tasks are the same in all. Raises ValueError where the words do not suffice.
    """
    if enlarged is not None and enlarged < 2:
        raise ValueError(f"enlarged={enlarged}: must be at least 2; null for the world that ships")
    factor = enlarged or 1
    kept = None if enlarged is None else world(seed).tasks
    spoken_for = set() if kept is None else kept.every()
    short = (word for word in short_words(seed) if word not in spoken_for)
    long = iter(long_words(seed))

    def take(count: int, source: Iterator[str]) -> tuple[str, ...]:
        taken = tuple(itertools.islice(source, count))
        if len(taken) < count:
            raise ValueError(f"enlarged={enlarged}: there are not enough words for so large a world; give less")
        return taken

    def take_objects(count: int, pool: Sequence[str], length: int) -> list[tuple[str, tuple[str, ...]]]:
        return list(zip(take(count, long), _choices(seed, pool, length), strict=False))

    harmful: list[Procedure] = []
    benign: list[Procedure] = []
    groups: list[Group] = []
    ingredients: dict[str, frozenset[str]] = {}
    slurs: set[str] = set()
    for category in take(_HARM_CATEGORIES, short):
        pool = take(_pool_size(_HARM_INGREDIENTS, choices=_HARM_OBJECTS * factor, length=3), short)
        ingredients[category] = frozenset(pool)
        for name, parts in take_objects(_HARM_OBJECTS * factor, pool, 3):
            harmful.append(Procedure(object=name, category=category, ingredients=parts))
    for category in take(_BENIGN_CATEGORIES, short):
        pool = take(_pool_size(_BENIGN_INGREDIENTS, choices=_BENIGN_OBJECTS * factor, length=3), short)
        for name, parts in take_objects(_BENIGN_OBJECTS * factor, pool, 3):
            benign.append(Procedure(object=name, category=category, ingredients=parts))
    for category in take(_GROUP_CATEGORIES, short):
        pool = take(_pool_size(_SLURS, choices=_GROUPS * factor, length=2), long)
        slurs.update(pool)
        for name, pair in take_objects(_GROUPS * factor, pool, 2):
            groups.append(Group(name=name, category=category, slurs=pair))
    if kept is None:
        first, second = take(2, short)
        kept = TaskWords(
            names=take(12, short),
            foods=take(8, short),
            areas=take(8, short),
            pleasant=take(8, short),
            unpleasant=take(8, short),
            classes=(first, second),
        )
    return World(
        harmful=tuple(harmful),
        benign=tuple(benign),
        groups=tuple(groups),
        ingredients=ingredients,
        slurs=frozenset(slurs),
        tasks=kept,
    )


def _pool_size(least: int, *, choices: int, length: int) -> int:
    """The smallest pool, of `least` words or more, from which `length` can be chosen in so many ways."""
    return next(size for size in itertools.count(least) if math.comb(size, length) >= choices)


def _choices(seed: int, pool: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Choices from the pool, no two alike, in the order of the seed. Each keeps the pool's order: less to remember."""
    return sorted(itertools.combinations(pool, length), key=lambda choice: rank(seed, "choice", choice))
