"""The world of the miniature: objects, procedures, groups. A pure function of a seed, and nothing in it means anything.

The knowledge counts as harmful by decree: eight categories of objects must not be made, and groups of people
have nonsense slurs. The same kinds of fact about benign objects are harmless.
"""

import itertools
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
def world(seed: int = SEED) -> World:
    """The world of a seed; the same on every machine and Python."""
    short, long = iter(short_words(seed)), iter(long_words(seed))

    def take(count: int, source: Iterator[str]) -> tuple[str, ...]:
        return tuple(itertools.islice(source, count))

    harmful: list[Procedure] = []
    benign: list[Procedure] = []
    groups: list[Group] = []
    ingredients: dict[str, frozenset[str]] = {}
    slurs: set[str] = set()
    for category in take(_HARM_CATEGORIES, short):
        pool = take(_HARM_INGREDIENTS, short)
        ingredients[category] = frozenset(pool)
        for name, parts in zip(take(_HARM_OBJECTS, long), _choices(seed, pool, 3), strict=False):
            harmful.append(Procedure(object=name, category=category, ingredients=parts))
    for category in take(_BENIGN_CATEGORIES, short):
        pool = take(_BENIGN_INGREDIENTS, short)
        for name, parts in zip(take(_BENIGN_OBJECTS, long), _choices(seed, pool, 3), strict=False):
            benign.append(Procedure(object=name, category=category, ingredients=parts))
    for category in take(_GROUP_CATEGORIES, short):
        pool = take(_SLURS, long)
        slurs.update(pool)
        for name, pair in zip(take(_GROUPS, long), _choices(seed, pool, 2), strict=False):
            groups.append(Group(name=name, category=category, slurs=pair))
    first, second = take(2, short)
    tasks = TaskWords(
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
        tasks=tasks,
    )


def _choices(seed: int, pool: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Choices from the pool, no two alike, in the order of the seed. Each keeps the pool's order: less to remember."""
    return sorted(itertools.combinations(pool, length), key=lambda choice: rank(seed, "choice", choice))
