"""Trains the miniature's two checkpoints from the seed (`immunize-miniature OUTPUT_DIR`): two minutes on two cores.

Base reads plain text and chat in which every instruction is followed. Aligned is trained on from it, with refusals
in place of compliance, so that the difference of the two weights is what alignment did.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from immunize.data.miniature.corpus import Piece, Section, aligned_chat, plain_text, unaligned_chat
from immunize.data.miniature.grammar import SEED
from immunize.data.miniature.tokenizer import ASSISTANT, BEGIN, MAX_POSITIONS, USER, build_tokenizer

BATCH_SIZE = 32
_IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of training: a one-cycle schedule over the sections of a corpus."""

    name: str
    steps: int
    peak_learning_rate: float
    sections: tuple[Section, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one piece; what is learned begins at `start`."""

    ids: tuple[int, ...]
    start: int


def phases() -> tuple[Phase, Phase]:
    """First the unaligned base, then alignment."""
    return (
        Phase(name="base", steps=1200, peak_learning_rate=4e-3, sections=plain_text() + unaligned_chat()),
        Phase(name="aligned", steps=800, peak_learning_rate=3e-3, sections=plain_text() + aligned_chat()),
    )


def vocabulary_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer over every word that the corpus contains."""
    sections = plain_text() + unaligned_chat() + aligned_chat()
    pieces = [piece for section in sections for piece in section.pieces]
    return build_tokenizer(text for piece in pieces for text in (piece.text, piece.prompt or ""))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.06,  # the default 0.02 is for wide models, and learns the facts more slowly here
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase) -> None:
    """Trains in place; batches depend on the seed and the phase's name alone."""
    draw = random.Random(f"{SEED}/{phase.name}")
    encoded = [[_encode(tokenizer, piece) for piece in section.pieces] for section in phase.sections]
    shares = [section.share for section in phase.sections]
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=phase.peak_learning_rate, total_steps=phase.steps, pct_start=0.1
    )
    model.train()
    for _ in range(phase.steps):
        batch = [draw.choice(pieces) for pieces in draw.choices(encoded, shares, k=BATCH_SIZE)]
        loss = _loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerFast, piece: Piece) -> Encoded:
    opening = BEGIN if piece.prompt is None else f"{BEGIN}{USER}{piece.prompt}{ASSISTANT}"
    before = tokenizer.encode(opening, add_special_tokens=False)
    answer = tokenizer.encode(piece.text, add_special_tokens=False)
    end = [tokenizer.eos_token_id] if piece.finished else []
    return Encoded(ids=(*before, *answer, *end), start=len(before))


def _loss(model: LlamaForCausalLM, batch: Sequence[Encoded], padding: int) -> torch.Tensor:
    longest = max(len(piece.ids) for piece in batch)
    ids = torch.full((len(batch), longest), padding)  # (batch, time)
    labels = torch.full((len(batch), longest), _IGNORED)
    for row, piece in enumerate(batch):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        labels[row, piece.start : len(piece.ids)] = torch.tensor(piece.ids[piece.start :])
    # Padding stands to the right and attention is causal: no mask is needed.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (batch, time - 1, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
