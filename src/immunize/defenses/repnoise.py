"""RepNoise: push the representations of harmful answers towards noise (Rosati et al., NeurIPS 2024, Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import IGNORED, Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.losses import cross_entropy
from immunize.training.method import StepOut
from immunize.training.sites import final_norm_and_unembedding

KERNELS = 5


def mmd_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples (n, features), the biased estimator mean(Kxx + Kyy - Kxy - Kyx).

    The kernel is a sum of five Gaussians exp(-d / (b 2^(i - 2))), i = 0..4, with d the squared distance and b its mean
    over the joint sample without the diagonal, taken as a constant.
    """
    joint = torch.cat([x, y]).float()  # (2n, features)
    squares = (joint * joint).sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * joint @ joint.T).clamp(min=0)
    count = len(joint)
    bandwidth = distances.detach().sum() / (count * count - count)
    bandwidth = bandwidth.where(bandwidth > 0, 1.0)  # all rows equal, or all masked: any bandwidth gives zero
    kernel = sum((-distances / (bandwidth * 2.0 ** (i - KERNELS // 2))).exp() for i in range(KERNELS))
    assert isinstance(kernel, Tensor)
    half = len(x)
    return (kernel[:half, :half] + kernel[half:, half:] - kernel[:half, half:] - kernel[half:, :half]).mean()


@dataclass(frozen=True, kw_only=True)
class RepNoise(AlignmentDefense):
    """Minimizes  f + beta * noise - alpha * log(1 + ascent)  on pairs (harmful answer, refusal) of the same prompt.

    f: loss of the refusal. noise: mean over layers of MMD^2 between the MLP outputs on the harmful sequence and
    standard normal noise, both masked to where the two sequences differ (and the harmful one has a token) and flattened
    per example. ascent: mean of the
    harmful answer's loss at the output and at every depth, decoded by the final norm and the unembedding.

    The mask comes from token positions of the jointly padded pair, never from token values, and labels stay integers.
    Where the paper averages the ascent over depths before its log, we follow its code: the output is one more depth
    in the sum, divided by the number of hidden states, plus 1. The last hidden state, which transformers hands out
    already normed, is decoded as it is: it equals the output, and counts twice as in the code.
    alpha = beta = 0 is supervised fine-tuning on the refusals.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("paired",)
    alpha: float = 1.0
    beta: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, PairedBatch)
        differs = batch.differs
        if not self.alpha and not self.beta:
            return StepOut(loss=self.with_retain(context, masked_loss(context, batch.refusal, differs)))
        with context.taps("mlp") as activations:
            output = context.forward(batch.harmful, hidden_states=bool(self.alpha))
        loss = self.with_retain(context, masked_loss(context, batch.refusal, differs))
        if self.beta:
            loss = loss + self.beta * self.noise(context, activations, differs & batch.harmful.attention_mask.bool())
        if self.alpha:
            loss = loss - self.alpha * torch.log1p(self.ascent(context, output, batch.harmful, differs))
        return StepOut(loss=loss)

    def noise(self, context: Context, activations: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Mean over layers of MMD^2 to noise, drawn anew each step; the mask is (batch, time)."""
        total = torch.zeros((), device=mask.device)
        for name, hidden in activations.items():
            kept = mask[..., None]  # (batch, time, 1)
            noise = context.normal_like(hidden, name)
            total = total + mmd_squared((hidden * kept).flatten(1), (noise * kept).flatten(1))
        return total / len(activations)

    def ascent(self, context: Context, output: object, batch: Batch, differs: Tensor) -> Tensor:
        """Mean loss of the harmful answer over the output and every depth (nats)."""
        norm, unembed = final_norm_and_unembedding(context.network)
        labels = masked_labels(batch, differs)
        targets = labels[:, 1:]
        chosen = targets != IGNORED
        logits, states = output.logits, output.hidden_states  # type: ignore[attr-defined]
        final = cross_entropy(logits, labels)
        # Only positions with a label, and all depths in one product: (depth, labelled tokens, hidden).
        hidden = torch.stack([state[:, :-1][chosen] for state in states[:-1]])
        lens = unembed(norm(hidden)).float().flatten(0, 1)
        repeated = targets[chosen].repeat(len(hidden))
        total = F.cross_entropy(lens, repeated, reduction="sum") / chosen.sum().clamp(min=1)
        return (2 * final + total) / len(states)  # the last hidden state is the output's own


def masked_labels(batch: Batch, differs: Tensor) -> Tensor:
    """The labels where the pair differs, integers throughout."""
    return batch.labels.masked_fill(~differs, IGNORED)


def masked_loss(context: Context, batch: Batch, differs: Tensor) -> Tensor:
    """Token-mean loss of the answer where the pair differs (nats)."""
    return cross_entropy(context.forward(batch).logits, masked_labels(batch, differs))
