"""RepNoise: push the representations of harmful answers towards noise (Rosati et al., NeurIPS 2024, Algorithm 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunize.data.batches import IGNORED, Batch, PairedBatch
from immunize.models.predictions import MOST_LOGITS, Predictions
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.losses import cross_entropy
from immunize.training.method import StepOut
from immunize.training.sites import final_norm_and_unembedding

KERNELS = 5
RowLoss = Callable[[Tensor, Tensor], Tensor]


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


class _Chunked(torch.autograd.Function):
    """The sum of a loss over chunks of rows. Each is differentiated while its logits are there, so none is kept or
    computed twice; what is kept are gradients, of the size of the rows and of the weights (these in float32).
    """

    @staticmethod
    def forward(ctx: Any, loss: RowLoss, size: int, rows: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device)
        of_rows = torch.empty_like(rows)
        of_weights = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(chunk, targets[start : start + size])
            of_rows[start : start + size], *found = torch.autograd.grad(value, [chunk, *weights])
            for held, gradient in zip(of_weights, found, strict=True):
                held += gradient
            total += value.detach()
        ctx.gradients = of_rows, *of_weights
        ctx.dtypes = [tensor.dtype for tensor in (rows, *weights)]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scale,) = outputs
        of_rows, *of_weights = (
            (gradient * scale).to(dtype) for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return None, None, of_rows, None, *of_weights


def in_chunks(loss: RowLoss, rows: Tensor, targets: Tensor, *, modules: Sequence[nn.Module], size: int) -> Tensor:
    """`loss(rows, targets)`, a sum over rows (rows, hidden), computed from at most `size` of them at a time (at least
    one). `modules` have the weights that it depends on.
    """
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    found: Tensor = _Chunked.apply(loss, max(1, size), rows, targets, *weights)
    return found


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

    `most_logits` bounds memory. Above it, depths are decoded in chunks of that many logits (64 MB), and the harmful
    answers are differentiated before the refusals are run: the same but for rounding.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("paired",)
    most_logits: ClassVar[int] = MOST_LOGITS
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
            found = context.predict(masked(batch.harmful, differs), hidden_states=bool(self.alpha))
        if differs.numel() * found.logits.shape[-1] <= self.most_logits:
            loss = self.with_retain(context, masked_loss(context, batch.refusal, differs))
            return StepOut(loss=loss + self.pushed(context, found, activations, batch))
        # One graph after the other: both at once would hold the activations of two passes.
        pushed = self.pushed(context, found, activations, batch)
        grads = context.grad(pushed)
        del found, activations
        loss = self.with_retain(context, masked_loss(context, batch.refusal, differs))
        return StepOut(loss=loss + pushed.detach(), grads=grads)

    def pushed(
        self, context: Context, found: Predictions, activations: dict[str, Tensor], batch: PairedBatch
    ) -> Tensor:
        """The terms of the harmful answers: beta * noise - alpha * log(1 + ascent)."""
        total = torch.zeros((), device=batch.differs.device)
        if self.beta:
            mask = batch.differs & batch.harmful.attention_mask.bool()
            total = total + self.beta * self.noise(context, activations, mask)
        if self.alpha:
            total = total - self.alpha * torch.log1p(self.ascent(context, found))
        return total

    def noise(self, context: Context, activations: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Mean over layers of MMD^2 to noise, drawn anew each step; the mask is (batch, time)."""
        total = torch.zeros((), device=mask.device)
        for name, hidden in activations.items():
            kept = mask[..., None]  # (batch, time, 1)
            noise = context.normal_like(hidden, name)
            total = total + mmd_squared((hidden * kept).flatten(1), (noise * kept).flatten(1))
        return total / len(activations)

    def ascent(self, context: Context, found: Predictions) -> Tensor:
        """Mean loss of the harmful answer over the output and every depth (nats)."""
        norm, unembed = final_norm_and_unembedding(context.network)
        states, chosen = found.states, found.labelled
        final = cross_entropy(found)
        width = found.logits.shape[-1]

        def decoded(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(unembed(norm(rows)).float(), targets, reduction="sum")

        # Only positions with a label: (depth x labelled tokens, hidden).
        rows = torch.cat([state[:, :-1][chosen] for state in states[:-1]])
        repeated = found.targets[found.targets != IGNORED].repeat(len(states) - 1)
        if len(rows) * width <= self.most_logits:
            total = decoded(rows, repeated)
        else:
            total = in_chunks(decoded, rows, repeated, modules=(norm, unembed), size=self.most_logits // width)
        total = total / chosen.sum().clamp(min=1)
        return (2 * final + total) / len(states)  # the last hidden state is the output's own


def masked(batch: Batch, differs: Tensor) -> Batch:
    """The batch with labels only where the pair differs, integers throughout."""
    return replace(batch, labels=batch.labels.masked_fill(~differs, IGNORED))


def masked_loss(context: Context, batch: Batch, differs: Tensor) -> Tensor:
    """Token-mean loss of the answer where the pair differs (nats)."""
    return context.ce(masked(batch, differs))
