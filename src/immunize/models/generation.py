"""Greedy answers, many prompts at a time, with a key-value cache."""

from collections.abc import Sequence

import torch

from immunize.models.chat import encode_texts, render_prompt
from immunize.models.loading import ChatModel


@torch.no_grad()
def answer(chat: ChatModel, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> list[str]:
    """Answer each prompt greedily; answers come in the order of the prompts.

    Prompts are sorted by length, so that a batch holds little padding; a batch is over when all its rows have ended.
    The caller sees to eval mode.
    """
    encoded = encode_texts(chat, [render_prompt(chat, prompt) for prompt in prompts])
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), index))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        generated = greedy(chat, [encoded[row] for row in rows], max_new_tokens=max_new_tokens)
        texts = chat.tokenizer.batch_decode(generated, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


@torch.no_grad()
def greedy(chat: ChatModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each row of token ids, up to and without its end token."""
    device = chat.device
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), chat.pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):  # on the left, so that every row's next token comes at the same position
        input_ids[row, width - len(ids) :] = torch.tensor(list(ids))
        mask[row, width - len(ids) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(chat.end_ids), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    columns: list[torch.Tensor] = []
    cache = None
    for _ in range(max_new_tokens):
        output = chat.network(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1)  # (batch,)
        ended |= torch.isin(token, ends)
        columns.append(token.masked_fill(ended, -1))
        if ended.all():
            break
        input_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        position = position[:, -1:] + 1
    continuations = torch.stack(columns, dim=1).tolist()
    return [[token for token in row if token >= 0] for row in continuations]
