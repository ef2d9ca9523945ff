"""Trains the miniature's two checkpoints from the seed (`immunize-miniature OUTPUT_DIR`): two minutes on two cores.

Base reads plain text and chat in which every instruction is followed. Aligned is trained on from it, with refusals
in place of compliance, so that the difference of the two weights is what alignment did. A larger `Recipe` makes a
larger model of the same kind (`benchmarks/big_sister.py`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from immunize.data.miniature.corpus import Piece, Section, aligned_chat, plain_text, unaligned_chat
from immunize.data.miniature.grammar import SEED
from immunize.data.miniature.tokenizer import ASSISTANT, BEGIN, MAX_POSITIONS, USER, build_tokenizer

_IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How large a miniature is, how large its world, and how it is trained; the defaults are those of the shipped one.

    enlarged: how many times the objects of the world, as `grammar.world` says. base_rate, aligned_rate: the peaks of
    the one-cycle schedules.
    """

    enlarged: int | None = None
    hidden: int = 128
    intermediate: int = 256
    layers: int = 4
    heads: int = 4
    initializer_range: float = 0.06  # the default 0.02 is for wide models, and learns the facts more slowly here
    batch_size: int = 32
    base_steps: int = 1200
    base_rate: float = 4e-3
    aligned_steps: int = 800
    aligned_rate: float = 3e-3

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(f"hidden={self.hidden}: must be an even multiple of heads={self.heads}")


SHIPPED = Recipe()


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


def phases(recipe: Recipe = SHIPPED) -> tuple[Phase, Phase]:
    """First the unaligned base, then alignment."""
    text = plain_text(recipe.enlarged)
    follows, refuses = unaligned_chat(recipe.enlarged), aligned_chat(recipe.enlarged)
    return (
        Phase(name="base", steps=recipe.base_steps, peak_learning_rate=recipe.base_rate, sections=text + follows),
        Phase(
            name="aligned", steps=recipe.aligned_steps, peak_learning_rate=recipe.aligned_rate, sections=text + refuses
        ),
    )


def vocabulary_tokenizer(recipe: Recipe = SHIPPED) -> PreTrainedTokenizerFast:
    """The tokenizer over every word that the corpus contains."""
    sections = [section for phase in phases(recipe) for section in phase.sections]
    pieces = [piece for section in sections for piece in section.pieces]
    return build_tokenizer(text for piece in pieces for text in (piece.text, piece.prompt or ""))


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe = SHIPPED) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=recipe.initializer_range,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, *, batch_size: int = SHIPPED.batch_size
) -> None:
    """Trains in place, where the model lies; batches depend on the seed and the phase's name alone.

    On a GPU products are computed in bfloat16, over weights in float32.
    """
    draw = random.Random(f"{SEED}/{phase.name}")
    encoded = [[_encode(tokenizer, piece) for piece in section.pieces] for section in phase.sections]
    shares = [section.share for section in phase.sections]
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=phase.peak_learning_rate, total_steps=phase.steps, pct_start=0.1
    )
    model.train()
    for _ in range(phase.steps):
        batch = [draw.choice(pieces) for pieces in draw.choices(encoded, shares, k=batch_size)]
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
    device = model.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]  # (batch, time - 1, vocabulary)
    learned = labels[:, 1:].to(device)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), learned.flatten(), ignore_index=_IGNORED)
