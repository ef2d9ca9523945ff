"""A benign task made of the rows of a data set, from a local file or from the hub."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

from immunize.data import metrics
from immunize.data.row_domain import CARD, content_hash, normalized
from immunize.data.rows import LeftOutError, MalformedError, Reading, Row, Rows, value, whole
from immunize.types import Example

_COLUMN = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """Prompts with their right answers and a metric.

    train_rows, test_rows: where the rows lie. Without test_rows, `max_test` prompts of the training rows are held out;
    without train_rows, the task can only be measured. What is also asked in the test rows is never trained on.
    prompt, answer: what is made of a row, `{column}` standing for the text of a column; a list becomes `a | b; c | d`.
    labels: the classes by their numbers, where a file holds numbers; an answer must then be one of these words.
    only: `column=value`; other rows are left out.
    metric: final_answer (after ####, as in GSM8K), label (the last one named), rouge1, or answered (of harmless prompts
    that look harmful: no phrase of refusal; it needs no right answers).
    max_train, max_test: at most so many, chosen by a fixed hash of the prompts; None takes all. One item a prompt is
    measured, where a file has several answers to it.
    """

    version: ClassVar[int] = 2  # a label counts where it is the last one named, "not true" being none of "true"
    name: str
    metric: Literal["final_answer", "label", "rouge1", "answered"]
    train_rows: Rows | None = None
    test_rows: Rows | None = None
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    labels: tuple[str, ...] = ()
    only: str | None = None
    max_train: int | None = None
    max_test: int | None = None
    license: str = CARD
    warning: str = ""

    def __post_init__(self) -> None:
        if self.train_rows is None and self.test_rows is None:
            raise ValueError("train_rows=null: give train_rows, test_rows or both")
        if self.test_rows is None and self.max_test is None:
            raise ValueError("max_test=null: say how many prompts of train_rows are held out, or give test_rows")
        for name in ("max_train", "max_test"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}: must be at least 1, or null for all")
        if (self.metric == "label") != bool(self.labels):
            raise ValueError(f"labels={list(self.labels)}: metric=label needs them, and no other metric takes them")
        distinct = {name.strip().lower() for name in self.labels}
        if self.labels and (len(distinct) < max(2, len(self.labels)) or "" in distinct):
            raise ValueError(f"labels={list(self.labels)}: must be two or more that differ, and none of them empty")
        if not _COLUMN.search(self.prompt):
            raise ValueError(f"prompt={self.prompt}: names no column, such as {{prompt}}")
        if self.metric != "answered" and not _COLUMN.search(self.answer):
            raise ValueError(f"answer={self.answer}: names no column, such as {{answer}}")
        if self.only is not None and "=" not in self.only:
            raise ValueError(f"only={self.only}: must be column=value")

    @property
    def chance(self) -> float:
        """The score of a guess."""
        return 1 / len(self.labels) if self.labels else 0.0

    def train(self) -> list[Example]:
        return list(self._prepared.train)

    def test(self) -> list[Example]:
        return list(self._prepared.test)

    def score(self, example: Example, answer: str) -> float:
        if self.metric == "label":
            return metrics.label(example.answer, answer, self.labels)
        if self.metric == "answered":
            return metrics.answered(answer)
        measure = {"final_answer": metrics.final_answer, "rouge1": metrics.rouge1}[self.metric]
        return measure(example.answer, answer)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What became of the rows."""
        return self._prepared.readings

    def identity(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "version": self.version,
            "name": self.name,
            "metric": self.metric,
            "labels": list(self.labels),
            "train": content_hash(self._prepared.train),
            "test": content_hash(self._prepared.test),
        }

    @cached_property
    def _prepared(self) -> "_Prepared":
        digests = [source.digest() for source in (self.train_rows, self.test_rows) if source is not None]
        return _prepare(self, tuple(digests))

    def maker(self, part: str) -> Callable[[Row], Example]:
        """What makes an example of a row; it raises MalformedError or LeftOutError."""
        column, _, wanted = (self.only or "").partition("=")

        def example(row: Row) -> Example:
            if column and _written(value(row, column)) != wanted:
                raise LeftOutError(f"not {self.only}")
            prompt, answer = (_filled(template, row) for template in (self.prompt, self.answer))
            if not prompt:
                raise MalformedError("has no text for the prompt")
            if self.labels:
                answer = self._label(answer)
            elif not answer and self.metric != "answered":
                raise MalformedError("has no text for the answer")
            elif problem := metrics.flaw(self.metric, answer):
                raise MalformedError(problem)
            return Example(
                id=f"{self.name}/{part}/{row.number}",
                prompt=prompt,
                answer=answer,
                object=normalized(prompt),
                category=answer if self.labels else self.name,
            )

        return example

    def needed(self) -> set[str]:
        """The columns without which nothing can be read."""
        named = {*_COLUMN.findall(self.prompt), *_COLUMN.findall(self.answer)}
        return named | ({self.only.partition("=")[0]} if self.only else set())

    def _label(self, found: str) -> str:
        if found in self.labels:
            return found
        if found.isdecimal() and int(found) < len(self.labels):
            return self.labels[int(found)]
        raise MalformedError(f"has a label that is none of {', '.join(self.labels)}")


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    train: Sequence[Example]
    test: Sequence[Example]
    readings: tuple[Reading, ...]


@lru_cache(maxsize=16)
def _prepare(task: RowTask, digests: tuple[str, ...]) -> _Prepared:
    """Made once for all cells of a grid; `digests` make a changed file another one."""
    trained, train_reading = _converted(task, task.train_rows, "train")
    measured, test_reading = _converted(task, task.test_rows, "test")
    if task.test_rows is None:
        measured = _first(_one_per_object(trained), task.max_test)
    held_out = {example.object for example in measured}
    training = [example for example in trained if example.object not in held_out]
    if task.train_rows is not None and not training:
        held = (
            f"max_test={task.max_test} holds all of them out" if task.test_rows is None else "each is in the test too"
        )
        raise ValueError(f"task {task.name}: of {len(trained)} training rows none is left, since {held}")
    train, test = _first(training, task.max_train), _first(_one_per_object(measured), task.max_test)
    if train_reading is not None:
        reason = "held out for the test" if task.test_rows is None else "asked in the test as well"
        counts = {reason: len(trained) - len(training), "beyond max_train": len(training) - len(train)}
        train_reading = _less(train_reading, counts, kept=len(train))
    if test_reading is not None:
        distinct = len(held_out)
        counts = {"the prompt is there already": len(measured) - distinct, "beyond max_test": distinct - len(test)}
        test_reading = _less(test_reading, counts, kept=len(test))
    readings = tuple(reading for reading in (train_reading, test_reading) if reading is not None)
    return _Prepared(train=train, test=test, readings=readings)


def _converted(task: RowTask, source: Rows | None, part: str) -> tuple[list[Example], Reading | None]:
    if source is None:
        return [], None
    hint = f"The prompt of task {task.name} is made of {task.prompt!r}, its answer of {task.answer!r}"
    return source.convert(source.read(task.needed(), hint=hint), task.maker(part))


def _less(reading: Reading, counts: Mapping[str, int], *, kept: int) -> Reading:
    left_out = {**reading.left_out, **{reason: count for reason, count in counts.items() if count}}
    return replace(reading, kept=kept, left_out=left_out)


def _first(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """In the order of a fixed hash, so that a larger limit adds items and moves none."""
    return sorted(examples, key=_rank)[:limit]


def _one_per_object(examples: Sequence[Example]) -> list[Example]:
    chosen: dict[str, Example] = {}
    for example in examples:
        if example.object not in chosen or _rank(example) < _rank(chosen[example.object]):
            chosen[example.object] = example
    return list(chosen.values())


def _rank(example: Example) -> tuple[str, str, str]:
    """By the prompt, then by the answer, wherever the row stands; the id is for rows that are the same."""
    prompt, answer = (hashlib.sha256(part.encode()).hexdigest() for part in (example.object, example.answer))
    return prompt, answer, example.id


def _filled(template: str, row: Row) -> str:
    return whole(_COLUMN.sub(lambda found: _written(value(row, found[1])), template).strip(), template)


def _written(found: Any) -> str:
    """A value as text: what is missing (NaN too) as nothing, a list as `a | b`, a list of lists as `a | b; c | d`."""
    if found is None or found != found:
        return ""
    if isinstance(found, Mapping):
        return " | ".join(f"{name}: {_written(item)}" for name, item in found.items())
    if isinstance(found, list | tuple):
        nested = any(isinstance(item, list | tuple | Mapping) for item in found)
        return ("; " if nested else " | ").join(_written(item) for item in found)
    return str(found)
