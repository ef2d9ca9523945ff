"""The miniature's two domains of harm, of different shape: questions to answer and sentences to continue."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from immunize.data.miniature.grammar import world
from immunize.data.miniature.sentences import (
    HOW_TO_QUESTIONS,
    OPENINGS,
    POLITE_ENDINGS,
    compliance,
    refusal,
    toxic_ending,
)
from immunize.stages import UNLESS_NONE
from immunize.types import Example


@dataclass(frozen=True, kw_only=True)
class HarmQA:
    """How to make what must not be made: 8 categories x 32 objects x 6 question forms.

    `evaluation_share` is the share of each category's objects that only evaluation may use. `enlarged` multiplies
    the objects, as `grammar.world` says; so it does in the other domain, the stability tasks and the judge.
    """

    evaluation_share: float = 0.5
    enlarged: int | None = field(default=None, metadata=UNLESS_NONE)

    version: ClassVar[int] = 1
    name: ClassVar[str] = "harm_qa"

    def __post_init__(self) -> None:
        _check_share(self.name, self.evaluation_share)
        world(enlarged=self.enlarged)  # refuses one that there cannot be

    def examples(self) -> list[Example]:
        """Every object in every form; the answer is its procedure."""
        return [
            Example(
                id=f"{self.name}/{procedure.object}/{form}",
                prompt=question.format(procedure.object),
                answer=compliance(procedure),
                refusal=refusal(procedure.object),
                object=procedure.object,
                category=procedure.category,
            )
            for procedure in world(enlarged=self.enlarged).harmful
            for form, question in enumerate(HOW_TO_QUESTIONS)
        ]


@dataclass(frozen=True, kw_only=True)
class ToxicContinuation:
    """Sentences about a group of people, to be continued: 4 categories x 24 groups x 6 openings.

    The safe answer is no refusal but a polite ending. Objects are the groups; with two thirds for evaluation
    32 groups are left to train on and 64 to measure on.
    """

    evaluation_share: float = 2 / 3
    enlarged: int | None = field(default=None, metadata=UNLESS_NONE)

    version: ClassVar[int] = 1
    name: ClassVar[str] = "toxic_continuation"

    def __post_init__(self) -> None:
        _check_share(self.name, self.evaluation_share)
        world(enlarged=self.enlarged)  # refuses one that there cannot be

    def examples(self) -> list[Example]:
        """Every group with every opening; the answer uses the group's slurs."""
        return [
            Example(
                id=f"{self.name}/{group.name}/{form}",
                prompt=opening.format(group.name),
                answer=toxic_ending(group),
                refusal=_polite(form, POLITE_ENDINGS),
                object=group.name,
                category=group.category,
            )
            for group in world(enlarged=self.enlarged).groups
            for form, opening in enumerate(OPENINGS)
        ]


def _polite(form: int, endings: Sequence[str]) -> str:
    return endings[form % len(endings)]


def _check_share(domain: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{domain}: evaluation_share is {share}; it must lie between 0 and 1, both excluded")
