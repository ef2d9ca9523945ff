"""Greedy answers: row by row those of transformers, whatever the batch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from immunize.models.chat import encode_texts, render_prompt
from immunize.models.generation import answer, greedy
from immunize.models.loading import ChatModel

PROMPTS = ("the other apple and the plums", "an", "", "the answers are", "is the answer an apple", "other")
LENGTH = 12


@pytest.fixture(params=["llama", "gpt_neox", "gpt2"])
def chat(request: pytest.FixtureRequest, make_chat: Callable[..., ChatModel]) -> ChatModel:
    """The last one has absolute positions: with rotary ones, a shift by the padding would go unseen."""
    return make_chat(architecture=request.param)


def prompt_ids(chat: ChatModel) -> list[list[int]]:
    return encode_texts(chat, [render_prompt(chat, prompt) for prompt in PROMPTS])


def by_transformers(chat: ChatModel, ids: list[int], *, max_new_tokens: int = LENGTH) -> list[int]:
    """One row alone, without its end token."""
    whole = chat.network.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(chat.end_ids),
        pad_token_id=chat.pad_id,
    )
    new = whole[0, len(ids) :].tolist()
    ends = [position for position, token in enumerate(new) if token in chat.end_ids]
    return new[: ends[0]] if ends else new


def end_with(chat: ChatModel, token: int) -> None:
    chat.network.generation_config.eos_token_id = [token]


def scripted(chat: ChatModel, continuation: list[int]) -> ChatModel:
    """A model that writes `continuation` whatever it is asked."""
    position = iter(continuation)

    def network(input_ids: torch.Tensor, **options: Any) -> Any:
        logits = torch.zeros(len(input_ids), 1, chat.network.config.vocab_size)
        logits[:, :, next(position)] = 1
        return SimpleNamespace(logits=logits, past_key_values=None)

    network.generation_config = chat.network.generation_config  # type: ignore[attr-defined]
    network.parameters = chat.network.parameters  # type: ignore[attr-defined]
    network.config = chat.network.config  # type: ignore[attr-defined]
    return ChatModel(network=network, tokenizer=chat.tokenizer)


@pytest.mark.parametrize("max_new_tokens", [1, LENGTH])
def test_equals_transformers_row_by_row(chat: ChatModel, max_new_tokens: int) -> None:
    """Prompts of mixed length in one batch, against each alone."""
    ids = prompt_ids(chat)
    expected = [by_transformers(chat, row, max_new_tokens=max_new_tokens) for row in ids]
    assert greedy(chat, ids, max_new_tokens=max_new_tokens) == expected
    assert len({tuple(row) for row in expected}) > 1
    assert max(len(row) for row in expected) == max_new_tokens


def test_stops_at_the_end_token(chat: ChatModel) -> None:
    """An end token is taken from the middle of an answer; rows end at different lengths."""
    ids = prompt_ids(chat)
    end_with(chat, greedy(chat, ids, max_new_tokens=LENGTH)[0][3])
    ended = greedy(chat, ids, max_new_tokens=LENGTH)
    assert ended == [by_transformers(chat, row) for row in ids]
    assert len({len(row) for row in ended}) > 1
    assert len(ended[0]) <= 3


def test_row_that_ends_at_once_is_empty(chat: ChatModel) -> None:
    ids = prompt_ids(chat)
    end_with(chat, greedy(chat, ids, max_new_tokens=1)[2][0])
    assert greedy(chat, ids, max_new_tokens=LENGTH)[2] == []
    assert answer(chat, PROMPTS, max_new_tokens=LENGTH, batch_size=4)[2] == ""


def test_batch_size_changes_nothing_and_order_is_restored(chat: ChatModel) -> None:
    alone = [answer(chat, [prompt], max_new_tokens=LENGTH, batch_size=1)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 1
    for batch_size in (1, 2, 4, 100):
        assert answer(chat, PROMPTS, max_new_tokens=LENGTH, batch_size=batch_size) == alone
    assert answer(chat, PROMPTS[::-1], max_new_tokens=LENGTH, batch_size=4) == alone[::-1]


def test_answers_are_text_without_special_tokens_and_outer_blanks(make_chat: Callable[..., ChatModel]) -> None:
    chat = make_chat()
    tokens = encode_texts(chat, [" the apple <user>is<end>plums"])[0]
    assert answer(scripted(chat, tokens), ["an", "other"], max_new_tokens=50, batch_size=2) == ["the apple is"] * 2


def test_no_prompts_have_no_answers(chat: ChatModel) -> None:
    assert answer(chat, [], max_new_tokens=LENGTH, batch_size=4) == []


def test_rows_that_have_ended_leave_the_batch(chat: ChatModel) -> None:
    """Whenever they are half of it; the others go on as they would alone."""
    ids = prompt_ids(chat)
    whole = greedy(chat, ids, max_new_tokens=LENGTH)
    end_with(chat, max(set(whole[0] + whole[1]), key=lambda token: sum(token in row[:4] for row in whole)))
    expected = [by_transformers(chat, row) for row in ids]
    sizes: list[int] = []
    hook = chat.network.register_forward_pre_hook(
        lambda module, args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    assert greedy(chat, ids, max_new_tokens=LENGTH) == expected
    hook.remove()
    for step, size in enumerate(sizes):
        going = sum(len(row) >= step for row in expected)
        assert going <= size < 2 * max(1, going) or size == len(ids)
    assert 0 < sizes[-1] < len(ids)


def test_an_answer_that_the_model_could_not_read_to_its_end_is_refused(chat: ChatModel) -> None:
    """The model reads 128 tokens, of which the prompt takes some."""
    (ids,) = encode_texts(chat, [render_prompt(chat, "the apple")])
    assert answer(chat, ["the apple"], max_new_tokens=128 - len(ids), batch_size=1)
    with pytest.raises(ValueError, match=rf"prompt of {len(ids)} tokens .* the 128 .*; lower model\.max_new_tokens"):
        answer(chat, ["the apple"], max_new_tokens=129 - len(ids), batch_size=1)
