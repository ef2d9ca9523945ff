"""From text to token ids with the model's own chat template, with masks that are exact to the token."""

import math
from collections.abc import Sequence
from typing import Any

from immunize.data.batches import Encoded
from immunize.models.loading import ChatModel

DATE = "01 Jan 2025"


def render_prompt(chat: ChatModel, prompt: str) -> str:
    """The text up to and including the header of the answer."""
    return _render(chat, [_user(prompt)], add_generation_prompt=True)


def render_answer(chat: ChatModel, prompt: str, answer: str) -> str:
    """The text after the header: the answer and what ends it."""
    turns = [_user(prompt), {"role": "assistant", "content": answer}]
    whole = _render(chat, turns, add_generation_prompt=False)
    start = render_prompt(chat, prompt)
    if not whole.startswith(start):
        raise ValueError(
            "the chat template writes an answered conversation differently from its own generation prompt, so the "
            f"answer cannot be told from the prompt: {start!r} is no beginning of {whole!r}"
        )
    return whole[len(start) :]


def encode(chat: ChatModel, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """Encode (prompt, answer) pairs for training, each cut after the token that ends the answer.

    Prompt and answer are tokenized apart and joined, so that no merge across the border shifts the mask by one; this
    is also what the model sees when it answers, where the prompt's tokens are fixed before the first answer token.
    """
    heads = encode_texts(chat, [render_prompt(chat, prompt) for prompt, _ in pairs])
    tails = encode_texts(chat, [render_answer(chat, prompt, answer) for prompt, answer in pairs])
    encoded = [
        Encoded(ids=tuple(head + _until_end(tail, chat.end_ids)), answer_start=len(head))
        for head, tail in zip(heads, tails, strict=True)
    ]
    longest = max((len(item.ids) for item in encoded), default=0)
    if longest > (limit := readable(chat)):
        raise ValueError(f"a conversation of {longest} tokens is longer than the {limit} that the model can read")
    return encoded


def readable(chat: ChatModel) -> float:
    """How many tokens the model can read, infinity where it does not say; beyond, it breaks or writes nonsense."""
    return getattr(chat.network.config, "max_position_embeddings", None) or math.inf


def encode_texts(chat: ChatModel, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts as they stand; templates write their own special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = chat.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _render(chat: ChatModel, turns: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    text: str = chat.tokenizer.apply_chat_template(
        turns, add_generation_prompt=add_generation_prompt, tokenize=False, strftime_now=_no_date, date_string=DATE
    )
    return text


def _no_date(layout: str) -> str:
    """Some templates write the date of today, which would change every result from day to day."""
    return DATE


def _user(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": prompt}


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """Without what a template writes after the last end token (a line break, mostly): generation never gets there."""
    ends = [position for position, token in enumerate(ids) if token in end_ids]
    if not ends:
        raise ValueError(
            "the chat template writes no end token after an answer, so that a model would never learn to stop; "
            "set eos_token_id in generation_config.json to the token that the template writes"
        )
    return ids[: ends[-1] + 1]
