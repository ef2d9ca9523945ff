"""Booster: make the harmful loss hard to reduce by a step of fine-tuning (Huang et al., ICLR 2025, Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class Booster(AlignmentDefense):
    """Minimizes  f(w) + weight (h(w) - h(w - radius g / |g|)),  g being the gradient of h at w.

    f is the loss of refusals, h that of harmful answers (token means, nats); both points see the same harmful batch,
    under the same dropout masks. The update is the paper's, which leaves out the Jacobian of the inner step: the
    gradient of f at w, plus weight times that of h at w less that of h at the other point. The norm is that of all
    trainable parameters together, plus 1e-7. So radius is a length in their space: it must be found anew where the
    trainable set changes, and in bfloat16 a short one is lost in the rounding of the weights.

    Ours: benign conversations beside the refusals (`retain_weight`). The norm is taken over each micro-batch on its
    own. weight = 0 or radius = 0 is supervised fine-tuning on the refusals.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("refusals", "harmful")
    weight: float = 5.0
    radius: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "radius"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")

    @property
    def passes(self) -> float:
        """Those of the batches, and a second one of the harmful batch."""
        return super().passes + 1

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        # Before the loss: its graph must see the weights that it is differentiated at.
        grads = self.attenuation(context) if self.weight and self.radius else None
        return StepOut(loss=self.with_retain(context, context.ce(batch)), grads=grads)

    def attenuation(self, context: Context) -> dict[str, torch.Tensor]:
        """weight times the difference of the harmful gradients, here less there."""
        batch = context.draw("harmful")
        with context.same_rng():
            here = context.grad(context.ce(batch))
        length = torch.stack([grad.float().norm() for grad in here.values()]).norm() + 1e-7
        with context.same_rng(), context.at({name: -self.radius / length * grad for name, grad in here.items()}):
            there = context.grad(context.ce(batch))
        return {name: self.weight * (here[name] - there[name]) for name in here}
