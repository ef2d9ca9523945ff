"""Greedy answers, many prompts at a time, with a key-value cache."""

from collections.abc import Sequence

import torch

from immunize.models.chat import encode_texts, readable, render_prompt
from immunize.models.loading import ChatModel


def answer(chat: ChatModel, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> list[str]:
    """Answer each prompt greedily; answers come in the order of the prompts. The caller sees to eval mode."""
    encoded = encode_texts(chat, [render_prompt(chat, prompt) for prompt in prompts])
    longest = max(map(len, encoded), default=0)
    if longest + max_new_tokens > (limit := readable(chat)):
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of max_new_tokens={max_new_tokens} are longer than "
            f"the {limit} tokens that the model can read; lower model.max_new_tokens"
        )
    generated = continuations(chat, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [chat.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in generated]


def continuations(
    chat: ChatModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """`greedy` in batches, sorted by length, so that a batch holds little padding."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        answers = greedy(chat, [prompts[row] for row in rows], max_new_tokens=max_new_tokens)
        found.update(zip(rows, answers, strict=True))
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def greedy(chat: ChatModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each row of token ids, up to and without its end token.

    Rows that have ended leave the batch whenever they are half of it, so that a long answer does not keep them all.
    """
    device = chat.device
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), chat.pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):  # on the left, so that every row's next token comes at the same position
        input_ids[row, width - len(ids) :] = torch.tensor(list(ids))
        mask[row, width - len(ids) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    ends = chat.end_ids
    answers: list[list[int]] = [[] for _ in prompts]
    rows, open_rows = list(range(len(prompts))), set(range(len(prompts)))  # those of the batch; those without an end
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
        tokens = output.logits[:, -1].argmax(-1)  # (rows,)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in open_rows and token not in ends:
                answers[row].append(token)
            else:
                open_rows.discard(row)
        if not open_rows:
            break
        position = position[:, -1:] + 1
        if 2 * len(open_rows) <= len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in open_rows], device=device)
            rows = [row for row in rows if row in open_rows]
            tokens, mask, position = tokens[kept], mask[kept], position[kept]
            cache.batch_select_indices(kept)
        input_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return answers
