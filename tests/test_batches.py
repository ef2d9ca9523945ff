"""Batches: the order is a pure function, masks go by position, pairs correspond."""

from dataclasses import replace

import pytest
import torch

from immunize.data.batches import IGNORED, Batch, Encoded, FixedBatches, PairedBatch, Stream, join, pad, pad_pair

END = 1


def conversation(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Encoded:
    return Encoded(ids=(*prompt, *answer, END), answer_start=len(prompt))


def stream(**changes: object) -> Stream:
    """Seven examples, told apart by their first token."""
    examples = [conversation((10 + index, 5), (6,) * (index % 3)) for index in range(7)]
    made = Stream(name="main", examples=examples, batch_size=3, pad_id=0, seed=0)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_order_is_a_pure_function_of_seed_name_and_number() -> None:
    forwards, backwards = stream(), stream()
    expected = [forwards.indices(number) for number in range(9)]
    assert [backwards.indices(number) for number in reversed(range(9))] == expected[::-1]
    for other in (stream(seed=1), stream(name="retain")):
        assert [other.indices(number) for number in range(9)] != expected


def test_order_does_not_touch_or_read_the_global_random_state() -> None:
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), stream().indices(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert stream().indices(0) == first


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_each_epoch_covers_each_example_once(batch_size: int) -> None:
    """Also where an epoch ends inside a batch, and where a batch holds more than two epochs."""
    made = stream(batch_size=batch_size)
    taken = [index for number in range(21) for index in made.indices(number)]
    epochs = [taken[start : start + 7] for start in range(0, len(taken) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1], "shuffled anew in each epoch"


@pytest.mark.parametrize("pad_id", [0, END])
def test_masks_go_by_position(pad_id: int) -> None:
    """The end token keeps its label, and an end token inside the prompt none, also where padding is the end token."""
    batch = pad([conversation((5, END), (7,)), conversation((5,), ())], pad_id=pad_id)
    assert batch.input_ids.tolist() == [[5, END, 7, END], [5, END, pad_id, pad_id]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, END], [IGNORED, END, IGNORED, IGNORED]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (batch.examples, batch.tokens) == (2, 6)


def test_pairs_are_padded_to_one_length_and_correspond() -> None:
    examples = [conversation((10 + index, 5), (6,) * index) for index in range(5)]
    pairs = [conversation((10 + index, 5), (7, 8)) for index in range(5)]
    made = stream(examples=examples, pairs=pairs, batch_size=4)
    for number in range(5):
        batch = made.batch(number)
        assert isinstance(batch, PairedBatch)
        assert batch.harmful.input_ids.shape == batch.refusal.input_ids.shape
        assert torch.equal(batch.harmful.input_ids[:, :2], batch.refusal.input_ids[:, :2])
        assert batch.harmful.input_ids[:, 0].tolist() == [10 + index for index in made.indices(number)]
        assert batch.examples == 8
        assert batch.tokens == batch.harmful.tokens + batch.refusal.tokens


@pytest.mark.parametrize("pad_id", [0, END])
def test_differs_is_where_the_unpadded_sequences_differ(pad_id: int) -> None:
    harmful = [conversation((5, 6), (7, 8, 9)), conversation((5,), (7,)), conversation((5, 6), (7,))]
    refusal = [conversation((5, 6), (7,)), conversation((5,), (7,)), conversation((5, 6), (7, END))]
    batch = pad_pair(harmful, refusal, pad_id=pad_id)
    expected = []
    for one, other in zip(harmful, refusal, strict=True):
        width = batch.harmful.input_ids.shape[1]
        one_ids, other_ids = (list(item.ids) + [None] * (width - len(item.ids)) for item in (one, other))
        expected.append([a != b for a, b in zip(one_ids, other_ids, strict=True)])
    assert batch.differs.tolist() == expected


@pytest.mark.parametrize("epoch_end", [False, True])
def test_micro_batches_in_a_row_are_a_batch(epoch_end: bool) -> None:
    """For any number of processes, each taking its part: the shortest first, which are alike in what they pad."""
    whole = stream(batch_size=6 if epoch_end else 4)
    for count in (1, 2):
        for world in (1, 2):
            parts = count * world
            made = [
                stream(batch_size=whole.batch_size, micro_batches=parts, rank=r, world_size=world) for r in range(world)
            ]
            for number in range(9):
                numbers = range(number * count, (number + 1) * count)
                if whole.batch_size % parts == 0:
                    found = [index for j in numbers for ranked in made for index in ranked.indices(j)]
                    drawn = whole.indices(number)
                    lengths = [len(whole.examples[index].ids) for index in found]
                    assert sorted(found) == sorted(drawn)
                    assert found == drawn if parts == 1 else lengths == sorted(lengths)


@pytest.mark.parametrize("paired", [False, True])
def test_size_counts_the_parts_of_all_processes(paired: bool) -> None:
    """Also over the end of an epoch; each of the processes gives the same."""
    pairs = [conversation((10 + index, 5), (7,) * (index % 4)) for index in range(7)] if paired else None
    for world in (1, 2):
        common = {"pairs": pairs, "batch_size": 4, "micro_batches": 2, "world_size": world}
        made = [stream(rank=rank, **common) for rank in range(world)]
        for number in range(8):
            parts = [ranked.batch(number) for ranked in made]
            expected = (sum(part.examples for part in parts), sum(part.tokens for part in parts))
            assert [ranked.size(number) for ranked in made] == [expected] * world


def test_share_of_a_micro_batch_by_hand() -> None:
    """Four answers of 1, 2, 3 and 6 tokens: 3 and 9 of 12 in the halves, which are 2 x 3/12 and 2 x 9/12.

    An answer without a prompt has a first token that nothing predicts.
    """
    examples = [Encoded(ids=(9, *range(length)), answer_start=1) for length in (1, 2, 3)]
    examples.append(Encoded(ids=(9, *range(6)), answer_start=0))
    order = stream(examples=examples, batch_size=4).indices(0)
    made = stream(examples=[examples[order.index(i)] for i in range(4)], batch_size=4, micro_batches=2)
    assert [made.examples[i].labelled for i in made.indices(0) + made.indices(1)] == [1, 2, 3, 6]
    assert [made.batch(number).share for number in (0, 1)] == [0.5, 1.5]  # type: ignore[union-attr]
    assert made.batch(0).to(torch.device("cpu")).share == 0.5  # type: ignore[union-attr]
    ranked = replace(made, rank=1, world_size=2)
    assert ranked.batch(0).share == 1.5  # type: ignore[union-attr]
    assert replace(made, micro_batches=1).batch(0).share == 1  # type: ignore[union-attr]


def test_fixed_batches_are_the_first_of_the_stream() -> None:
    made = stream()
    fixed = FixedBatches(made, steps=4)
    assert len(fixed) == 4
    for number in range(4):
        assert torch.equal(fixed[number].input_ids, made.batch(number).input_ids)  # type: ignore[union-attr]


def test_rows_are_those_of_the_batches_whatever_their_number() -> None:
    """In the same order, across epochs: seven examples, batches of three, and rows by 2, 5, 1, 7."""
    made = stream()
    taken = [index for number in range(5) for index in made.indices(number)]
    start = 0
    for count in (2, 5, 1, 7):
        batch = made.rows(start, count)
        assert isinstance(batch, Batch)
        assert [token - 10 for token in batch.input_ids[:, 0].tolist()] == taken[start : start + count]
        start += count


@pytest.mark.parametrize("swapped", [False, True])
def test_joined_batches_are_their_examples_padded_together(swapped: bool) -> None:
    """Whichever of the two is wider."""
    narrow, wide = [conversation((5,), (7,))], [conversation((5, 6), (7, 8, END)), conversation((5,), ())]
    first, second = (wide, narrow) if swapped else (narrow, wide)
    found, expected = join(pad(first, pad_id=0), pad(second, pad_id=0), pad_id=0), pad([*first, *second], pad_id=0)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
