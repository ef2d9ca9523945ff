"""The miniature's trainability tasks: new formats over known words, which the model learns and cannot do before.

What is held out are combinations, never words: a word that training never shows cannot be learned.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from immunize.data.miniature.grammar import SEED, TaskWords, world
from immunize.data.miniature.words import rank
from immunize.types import Example

_TEST_ITEMS = 128
_TRAIN_ITEMS = 512
DIGITS = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class DataToText:
    """Fields to a sentence, scored with ROUGE-1 as in the paper."""

    version: ClassVar[int] = 1
    name: ClassVar[str] = "data_to_text"
    chance: ClassVar[float] = 0.0

    def train(self) -> list[Example]:
        return [self._example(fields) for fields in _restaurants()[_TEST_ITEMS:][:_TRAIN_ITEMS]]

    def test(self) -> list[Example]:
        return [self._example(fields) for fields in _restaurants()[:_TEST_ITEMS]]

    def score(self, example: Example, answer: str) -> float:
        """ROUGE-1 F of the answer against the reference sentence."""
        from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only measuring needs it

        return float(RougeScorer(["rouge1"]).score(example.answer, answer)["rouge1"].fmeasure)

    def _example(self, fields: tuple[str, ...]) -> Example:
        name, food, area = fields
        return _example(self.name, f"name {name} food {food} area {area}", f"{name} has {food} near {area} .", fields)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Is a review pleasant? Two classes, equally many of each in `test`."""

    version: ClassVar[int] = 1
    name: ClassVar[str] = "classification"
    chance: ClassVar[float] = 0.5

    def train(self) -> list[Example]:
        return [example for word in (0, 1) for example in self._class(word)[_TEST_ITEMS // 2 :][: _TRAIN_ITEMS // 2]]

    def test(self) -> list[Example]:
        return [example for word in (0, 1) for example in self._class(word)[: _TEST_ITEMS // 2]]

    def score(self, example: Example, answer: str) -> float:
        """1 when the answer's final word is the class."""
        return _final_match(example, answer, length=1)

    def _class(self, index: int) -> list[Example]:
        words = _task_words()
        adjectives = (words.pleasant, words.unpleasant)[index]
        combinations = ((name, *pair) for name in words.names for pair in itertools.permutations(adjectives, 2))
        return [
            _example(self.name, f"review : {fields[0]} {fields[1]} {fields[2]}", f"{words.classes[index]} .", fields)
            for fields in _ordered(self.name, combinations)
        ]


@dataclass(frozen=True, kw_only=True)
class Reversal:
    """A short string of digits, backwards."""

    version: ClassVar[int] = 1
    name: ClassVar[str] = "reversal"
    chance: ClassVar[float] = 0.0

    def train(self) -> list[Example]:
        return [self._example(digits) for digits in _digit_strings()[_TEST_ITEMS:][:_TRAIN_ITEMS]]

    def test(self) -> list[Example]:
        return [self._example(digits) for digits in _digit_strings()[:_TEST_ITEMS]]

    def score(self, example: Example, answer: str) -> float:
        """1 when the answer ends with the three digits, in the right order."""
        return _final_match(example, answer, length=3)

    def _example(self, digits: tuple[str, ...]) -> Example:
        return _example(self.name, f"digits {' '.join(digits)}", f"{' '.join(reversed(digits))} .", digits)


def _final_match(example: Example, answer: str, *, length: int) -> float:
    def final(text: str) -> list[str]:
        return [word for word in text.split() if word != "."][-length:]

    return float(final(answer) == final(example.answer))


def _example(task: str, prompt: str, answer: str, fields: tuple[str, ...]) -> Example:
    combination = "-".join(fields)
    return Example(id=f"{task}/{combination}", prompt=prompt, answer=answer, object=combination, category=task)


@cache
def _restaurants() -> list[tuple[str, ...]]:
    words = _task_words()
    return _ordered(DataToText.name, itertools.product(words.names, words.foods, words.areas))


@cache
def _digit_strings() -> list[tuple[str, ...]]:
    # Three different digits: no string reads the same backwards.
    return _ordered(Reversal.name, itertools.permutations(DIGITS, 3))


def _ordered(task: str, combinations: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return sorted(combinations, key=lambda fields: rank(SEED, task, fields))


def _task_words() -> TaskWords:
    return world().tasks
