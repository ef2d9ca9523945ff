"""Constrained SFT: hold the first tokens of an answer where they were (Qi et al., ICLR 2025, Eq. 3)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from immunize.data.batches import IGNORED, Batch, PairedBatch, Stream
from immunize.training.context import Context
from immunize.training.defense import FinetuningDefense
from immunize.training.losses import cross_entropy, log_probabilities
from immunize.training.method import StepOut

FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class ConstrainedSFT(FinetuningDefense):
    """Minimizes the mean over answer tokens of  -(2 / beta_t) log sigmoid(beta_t (log p_t - log p0_t)).

    p_t is the probability of token t of an answer (counted from 1, the prompt not counted), p0_t that before the
    tuning. The gradient is that of the log-likelihood with the weights w_t = 2 (1 - sigmoid(beta_t (log p_t - log
    p0_t))): 1 where nothing has moved, falling to 0 as the token gets likelier. beta_t is `first` for the first token,
    `early` for the others up to `early_tokens`, `late` from there on. Each weight is at least 0.001, as in the paper's
    code, whose loss, too, is the weighted log-likelihood with the weights held constant.

    The log p0_t come from one forward pass over the user's examples beforehand, in eval mode, in the batches of the
    first epoch, and are found again by an example's tokens. So the first epoch compares numbers of the same numerics,
    and without dropout the first step is that of supervised fine-tuning to the bit; later epochs pad otherwise, which
    moves a weight by 1e-6 or so. That pass is not counted in `passes`; it pays where there is more than one epoch.

    All betas 0 is supervised fine-tuning.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("main",)
    first: float = 0.5
    early: float = 2.0
    late: float = 0.1
    early_tokens: int = 5

    def __post_init__(self) -> None:
        for name in ("first", "early", "late"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.early_tokens < 1:
            raise ValueError(f"early_tokens={self.early_tokens}: must be at least 1; it counts the first token, too")

    @property
    def constrains(self) -> bool:
        return bool(self.first or self.early or self.late)

    def setup(self, context: Context) -> None:
        if not self.constrains:
            return
        context.state.before = {}
        for micro_batch in first_epoch(context.streams["main"]):
            batch = micro_batch.to(context.chat.device)
            with context.evaluating():
                found = context.predict(batch)
            rows = log_probabilities(found)[found.targets != IGNORED].split(found.labelled.sum(1).tolist())
            for key, values in zip(keys(batch), rows, strict=True):
                context.state.before.setdefault(key, values)

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, Batch)
        if not self.constrains:
            return StepOut(loss=context.ce(batch))
        found = context.predict(batch)
        mask = found.labelled
        gain = torch.zeros_like(mask, dtype=torch.float32)  # (batch, time - 1)
        before = torch.cat([context.state.before[key] for key in keys(batch)])
        with torch.no_grad():
            gain[mask] = log_probabilities(found)[found.targets != IGNORED] - before
        weights = self.token_weights(gain, mask)
        # A weighted mean times the mean weight: the weighted sum over the number of tokens.
        return StepOut(loss=cross_entropy(found, weights) * weights[mask].mean())

    def token_weights(self, gain: Tensor, mask: Tensor) -> Tensor:
        """w_t from the gain in log-probability; both (batch, time - 1), `mask` true on answer tokens."""
        position = mask.cumsum(1)  # of an answer's token, from 1
        beta = torch.full_like(gain, self.late)
        beta[position <= self.early_tokens] = self.early
        beta[position <= 1] = self.first
        return (2 * (1 - torch.sigmoid(beta * gain))).clamp(min=FLOOR)


def first_epoch(stream: Stream) -> Iterator[Batch]:
    """The micro-batches of the first epoch, of other processes as well: later epochs deal them out anew."""
    rows = stream.batch_size // stream.micro_batches
    for number in range(-(-len(stream.examples) // (rows * stream.world_size))):
        for rank in range(stream.world_size):
            batch = replace(stream, rank=rank).batch(number)
            assert isinstance(batch, Batch)
            yield batch


def keys(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """Each row without its padding: the token ids, and how many of them have a label."""
    lengths, labelled = batch.attention_mask.sum(1).tolist(), (batch.labels != IGNORED).sum(1).tolist()
    rows = zip(batch.input_ids.tolist(), lengths, labelled, strict=True)
    return [(tuple(ids[:length]), count) for ids, length, count in rows]
