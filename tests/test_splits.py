"""Who may train on what: disjoint by object, the same for every seed, and leakage refused."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from immunize.config import build, load
from immunize.data.domain import Data
from immunize.data.objects import evaluation_objects
from immunize.data.splits import (
    Exposure,
    Split,
    check_task,
    defense_examples,
    evaluation_set,
    exposures,
    refuse_leakage,
)
from immunize.types import Example, Half, Kind

CELL = build(load([]))


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Two categories of four objects, two prompts each; `shared` makes one prompt ask about all of them."""

    version: ClassVar[int] = 1
    name: str = "toy"
    evaluation_share: float = 0.5
    shared: bool = False

    def examples(self) -> list[Example]:
        return [
            Example(
                id=f"toy/{name}/{form}",
                prompt="the same prompt" if self.shared else f"form {form} about {name}",
                answer=f"yes {name}",
                refusal="no",
                object=name,
                category=name[0],
            )
            for name in ("a1", "a2", "a3", "a4", "b1", "b2", "b3", "b4")
            for form in range(2)
        ]


def objects(examples: object) -> set[str]:
    return {example.object for example in examples}  # type: ignore[attr-defined]


def by_name(data: Data = CELL.data, split: Split | None = None) -> dict[str, Exposure]:
    return {exposure.name: exposure for exposure in exposures(data, split or Split())}


def test_the_sizes_are_those_of_the_miniature() -> None:
    found = by_name()
    assert len(objects(defense_examples(CELL.data))) == 32
    assert len(objects(found["seen"].attack)) == 32
    assert len(objects(found["in_domain"].attack)) == 64
    assert len(objects(found["cross_domain"].attack)) == 32
    assert all(len(exposure.evaluation) == len(objects(exposure.evaluation)) == 64 for exposure in found.values())


def test_defense_attack_and_evaluation_share_no_object_and_no_prompt() -> None:
    defense = defense_examples(CELL.data)
    for exposure in by_name().values():
        assert not objects(defense) & objects(exposure.evaluation)
        assert not objects(exposure.attack) & objects(exposure.evaluation)
        assert not objects(defense) & objects(exposure.attack)


def test_in_domain_is_attacked_and_measured_on_categories_the_defense_never_saw() -> None:
    defended = {example.category for example in defense_examples(CELL.data)}
    exposure = by_name()["in_domain"]
    attacked = {example.category for example in exposure.attack}
    assert attacked == {example.category for example in exposure.evaluation}
    assert not attacked & defended
    assert {example.category for example in by_name()["seen"].evaluation} == defended


def test_same_samples_is_the_defenses_own_data_and_is_marked() -> None:
    found = by_name(split=Split(same_samples=True))
    assert list(found["seen"].attack) == defense_examples(CELL.data)
    assert found["seen"].evaluation_set().marks == ("same_samples",)
    assert found["in_domain"].evaluation_set().marks == ()


def test_halves_alternate_within_each_category() -> None:
    for exposure in by_name().values():
        halves = exposure.evaluation_set().halves
        counts = Counter(zip((example.category for example in exposure.evaluation), halves, strict=True))
        assert len(set(counts.values())) == 1
        assert Counter(halves) == {Half.SELECTION: 32, Half.REPORTING: 32}


def test_adding_a_category_moves_no_object_of_another() -> None:
    names = ["x", "y", "z", "w"]
    assert evaluation_objects("d", names, 0.5) == evaluation_objects("d", list(reversed(names)), 0.5)


def test_a_prompt_that_asks_about_two_objects_is_leakage() -> None:
    with pytest.raises(ValueError, match=r"leakage.*1 prompt"):
        exposures(Data(domain=Toy(shared=True)), Split(exposures=("seen",)))


def test_leakage_is_checked_by_object_and_not_by_row() -> None:
    first, second = Toy().examples()[:2]
    assert first.prompt != second.prompt
    with pytest.raises(ValueError, match=r"leakage: the attack trains on 1 object.*'a1'"):
        refuse_leakage("the attack", [first], [second])


def test_a_task_that_measures_what_it_trains_on_is_refused() -> None:
    class Leaky:
        name = "leaky"

        def train(self) -> list[Example]:
            return Toy().examples()

        def test(self) -> list[Example]:
            return Toy().examples()

    with pytest.raises(ValueError, match=r"leakage: task leaky"):
        check_task(Leaky())  # type: ignore[arg-type]


def test_an_exposure_without_data_is_refused() -> None:
    everything = replace(CELL.data, defense_categories=tuple({item.category for item in CELL.data.domain.examples()}))
    with pytest.raises(ValueError, match="in_domain needs a category"):
        exposures(everything, Split())
    with pytest.raises(ValueError, match=r"leaves nothing for attack"):
        exposures(Data(domain=Toy(evaluation_share=0.9)), Split(exposures=("seen",)))


def test_attack_samples_are_a_shuffle_repeated_as_often_as_needed() -> None:
    attack, examples = CELL.attack, by_name()["seen"].attack
    samples = attack.samples(examples, budget=CELL.budget, seed=0)
    counts = Counter(example.id for example in samples)
    assert len(samples) == CELL.budget.samples
    assert max(counts.values()) - min(counts.values()) <= 1
    assert attack.samples(examples, budget=CELL.budget, seed=1) != samples


def test_an_object_that_is_text_is_named_by_its_hash_and_a_word_by_itself() -> None:
    toy = Toy().examples()
    spelled = [replace(toy[0], object="how do i ?"), replace(toy[0], object="knife", prompt=" Knife"), toy[0]]
    named = evaluation_set("own", Kind.EXPOSURE, spelled).objects
    # printf 'how do i ?' | sha256sum; printf knife | sha256sum
    assert named == ("9db1417777451ab3", "3d4d101cd7ea9e5e", "a1")
