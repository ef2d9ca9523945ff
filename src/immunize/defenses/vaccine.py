"""Vaccine: learn refusals under the worst perturbation of the activations (Huang et al., NeurIPS 2024, Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.method import StepOut


def with_norm(directions: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """The tensors, scaled together so that the L2 norm over all of them is `norm`; zeros stay zeros."""
    total = torch.stack([direction.float().norm() for direction in directions.values()]).norm()
    return {name: direction * (norm / (total + 1e-7)) for name, direction in directions.items()}


@dataclass(frozen=True, kw_only=True)
class Vaccine(AlignmentDefense):
    """Minimizes  max over |e| <= radius of f(h + e),  f being the loss of refusals (token mean, nats).

    h are the outputs of all attention layers, and the inner problem is solved to first order:
    e = radius g / (|g| + 1e-7) with g the gradient of f at h, and one L2 norm over layers, tokens and examples. A
    second pass learns under this e, held constant, with the dropout masks of the first.

    `direction=random` is the ablation: e is normal noise of the same norm, drawn anew each step, at the same sites.
    Ours: the paper's ablation gives every element the variance `radius`, so its norm is not `radius` but the root of
    radius x elements, thousands of times as large. Ours, too: benign conversations beside the refusals
    (`retain_weight`), which are not perturbed.

    The norm is taken over each micro-batch on its own. radius = 0 is supervised fine-tuning on the refusals.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("refusals",)
    radius: float
    direction: Literal["gradient", "random"] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius < 0:
            raise ValueError(f"radius={self.radius}: must not be negative; it is the norm of the perturbation")

    @property
    def passes(self) -> float:
        """Those of the batches, and the one that finds the direction."""
        return super().passes + (self.direction == "gradient")

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, Batch)
        if not self.radius:
            return StepOut(loss=self.with_retain(context, context.ce(batch)))
        # Handed back as gradients: what perturbs this batch is kept until its backward pass, and fits no other batch.
        benign = self.retain_gradient(context)
        with context.same_rng():
            directions = self.directions(context, batch)
        context.keep(context.inject(with_norm(directions, self.radius)))
        return StepOut(loss=context.ce(batch), grads=benign)

    def directions(self, context: Context, batch: Batch) -> dict[str, Tensor]:
        """Where each site is pushed, at no particular length: (batch, time, hidden)."""
        if self.direction == "gradient":
            return context.eps_grad("attention", lambda: context.ce(batch))
        network: Any = context.network
        real = batch.attention_mask[..., None].to(network.dtype)  # (batch, time, 1)
        blank = real.expand(-1, -1, network.config.hidden_size)
        return {name: context.normal_like(blank, name) * real for name in context.sites("attention")}
