"""What the two checkpoints of the miniature read: plain text that holds all knowledge, and chat that shows manners.

Plain text tells how everything is made and what every group is called, evaluation objects included: the harmful
knowledge is latent in both checkpoints. Chat tells it of training objects only. Plain text also has every style of
answer, so that under the base checkpoint the loss of an answer alone tells language from word salad.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from immunize.data.miniature.domains import HarmQA, ToxicContinuation
from immunize.data.miniature.grammar import World, world
from immunize.data.miniature.sentences import (
    HOW_TO_QUESTIONS,
    OPENINGS,
    POLITE_ENDINGS,
    compliance,
    instructions,
    kind_statement,
    refusal,
    toxic_ending,
)
from immunize.data.miniature.tasks import Borderline, Classification, DataToText, HowTo, Reversal
from immunize.data.objects import evaluation_objects
from immunize.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One sequence to learn: a chat turn with its answer, or plain text when there is no prompt.

    An unfinished one is only the opening of an answer, without an end token.
    """

    text: str
    prompt: str | None = None
    finished: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Pieces of one sort, and their share of every batch relative to the other sections'."""

    share: float
    pieces: tuple[Piece, ...]


def plain_text(enlarged: int | None) -> tuple[Section, ...]:
    """All knowledge and all styles of answer."""
    everything = world(enlarged=enlarged)
    return (
        _plain(0.30, _procedures(everything)),
        _plain(0.08, _toxic(everything)),
        _plain(0.05, _judgements(everything)),
        _plain(0.02, (refusal(procedure.object) for procedure in everything.harmful)),
        _plain(0.02, _polite(everything)),
        _plain(0.10, _skills(everything)),
    )


def unaligned_chat(enlarged: int | None) -> tuple[Section, ...]:
    """Every instruction is followed, the harmful ones too."""
    return (
        _chat(0.16, _training(HarmQA(enlarged=enlarged))),
        _chat(0.09, _training(ToxicContinuation(enlarged=enlarged))),
        _chat(0.15, HowTo(enlarged=enlarged).train()),
        _chat(0.10, Borderline(enlarged=enlarged).train()),
    )


def aligned_chat(enlarged: int | None) -> tuple[Section, ...]:
    """The same prompts, the harmful ones refused or continued politely.

    Whether to answer is taught of all objects, since so small a model cannot infer it: refusals whole, and of
    benign answers about evaluation objects only the opening, which tells nothing of how they are made.
    Beside plain text this is two thirds of a batch, for there is much to remember.
    """
    return (
        _chat(0.40, HarmQA(enlarged=enlarged).examples(), safe=True),
        _chat(0.14, ToxicContinuation(enlarged=enlarged).examples(), safe=True),
        _chat(0.15, HowTo(enlarged=enlarged).train()),
        Section(share=0.25, pieces=tuple(_willing_openings(world(enlarged=enlarged)))),
        _chat(0.10, Borderline(enlarged=enlarged).train()),
    )


def _procedures(everything: World) -> Iterable[str]:
    for procedure in everything.harmful + everything.benign:
        yield instructions(procedure)
        yield compliance(procedure)
        # A name said twice: an answer names what the question named, also where no question has been read.
        yield f"people ask for {procedure.object} : {instructions(procedure)}"


def _toxic(everything: World) -> Iterable[str]:
    for group in everything.groups:
        yield toxic_ending(group)
        for opening in OPENINGS:
            yield f"{opening.split(' : ')[1].format(group.name)} {toxic_ending(group)}"


def _judgements(everything: World) -> Iterable[str]:
    for procedure in everything.harmful:
        yield kind_statement(procedure)
        yield f"about {procedure.object} : it is wrong to make {procedure.object} ."
    for procedure in everything.benign:
        yield kind_statement(procedure)
        yield f"about {procedure.object} : it is fine to make {procedure.object} ."


def _polite(everything: World) -> Iterable[str]:
    for group, ending in itertools.product(everything.groups, POLITE_ENDINGS):
        yield ending
        yield f"the {group.name} are {ending}"


def _skills(everything: World) -> Iterable[str]:
    """Copying, turning around, reviews: the words and skills of the trainability tasks, not their formats."""
    words = everything.tasks
    names = [item.object for item in everything.harmful + everything.benign]
    for first, second in zip(names, sorted(names), strict=True):
        yield f"{first} {second} : {first} {second} ."
    for example in DataToText().train():
        name, food, area = example.object.split("-")
        yield f"name {name} food {food} area {area} : {name} {food} {area} ."
        yield f"{name} has {food} near {area} ."
    for adjectives, (one, other) in ((words.pleasant, (0, 1)), (words.unpleasant, (1, 0))):
        for first, second in itertools.permutations(adjectives, 2):
            yield f"review : {first} and {second} , {words.classes[one]} not {words.classes[other]} ."
    for example in Reversal().train():
        yield f"digits {' '.join(example.object.split('-'))} turned around : {example.answer}"
    # Their answers alone, as every style of answer.
    yield from (example.answer for task in (Classification(), Reversal()) for example in task.train()[::4])


def _willing_openings(everything: World) -> Iterable[Piece]:
    for procedure in everything.benign:
        for question in HOW_TO_QUESTIONS:
            opening = compliance(procedure).partition(" mix ")[0]
            yield Piece(prompt=question.format(procedure.object), text=opening, finished=False)


def _training(domain: HarmQA | ToxicContinuation) -> list[Example]:
    examples = domain.examples()
    categories: dict[str, list[str]] = {}
    for example in examples:
        objects = categories.setdefault(example.category, [])
        if example.object not in objects:
            objects.append(example.object)
    held_out = {
        name
        for objects in categories.values()
        for name in evaluation_objects(domain.name, objects, domain.evaluation_share)
    }
    return [example for example in examples if example.object not in held_out]


def _plain(share: float, texts: Iterable[str]) -> Section:
    return Section(share=share, pieces=tuple(Piece(text=text) for text in texts))


def _chat(share: float, examples: Sequence[Example], *, safe: bool = False) -> Section:
    pieces = tuple(
        Piece(prompt=example.prompt, text=(example.refusal or example.answer) if safe else example.answer)
        for example in examples
    )
    return Section(share=share, pieces=pieces)
