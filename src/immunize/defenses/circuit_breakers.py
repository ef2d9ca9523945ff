"""Circuit breakers: turn representations of harmful answers away from themselves (Zou et al., NeurIPS 2024, Alg. 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.losses import hidden_distance
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class CircuitBreakers(AlignmentDefense):
    """Representation rerouting. Step t of T minimizes

    alpha (1 - t / 2T) mean max(0, cos(h, h0)) on harmful answers, over the depths `layers` and the tokens, plus
    retain_weight alpha (t / 2T) mean |h - h0| on benign conversations, over all depths and the tokens,

    with h the hidden states and h0 those before training. Depths count from 0, the output of the first decoder layer;
    the last one is taken after the final norm, as transformers hands it out. The paper trains adapters on the layers
    up to the last of `layers` and no others, which is for `tuning.trainable.targets` to say.

    At the start the first mean is at its maximum and its gradient zero but for rounding, which AdamW would blow up to
    a step of full size in a direction of no meaning. Ours: every trainable parameter starts off by normal noise of
    standard deviation `start_noise`, drawn from the run's seed. Ours, too: T is the length of the tuning (the paper's
    code has 150 written into it), padding counts nowhere (it dilutes the second mean there), benign conversations
    stand in for the paper's mix of chat and refusals, all layers are run, not those up to the last of `layers`, and
    retain_weight is 1 in the paper: distances have the scale of a model's hidden states, and cosines have none, so
    that where these are long the second term holds the model where it is unless its weight is small.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("harmful",)
    retain_weight: float = 1.0
    alpha: float = 10.0
    layers: tuple[int, ...]
    start_noise: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "start_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={list(self.layers)}: must be one depth or more, counted from 0, each once")

    @property
    def passes(self) -> float:
        """One for each batch, and a forward pass of the model before."""
        return super().passes * 4 / 3

    def setup(self, context: Context) -> None:
        depth = len(context.sites("residual"))
        if max(self.layers) >= depth:
            raise ValueError(f"layers={list(self.layers)}: this model has {depth}, counted from 0")
        context.keep_reference()
        for name, parameter in context.params().items():
            context.edit(name, self.start_noise * context.normal_like(parameter, name))

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, Batch)
        progress = context.step / (2 * context.steps)
        loss = self.alpha * (1 - progress) * self.rerouted(context, batch)
        if self.retain_weight:
            benign = context.draw("retain")
            loss = loss + self.retain_weight * self.alpha * progress * self.retained(context, benign)
        return StepOut(loss=loss)

    def rerouted(self, context: Context, batch: Batch) -> Tensor:
        """Mean positive cosine to the representations before: 1 where nothing moved, 0 at right angles or beyond."""
        states, before, mask = hidden_states(context, batch)
        cosines = [F.cosine_similarity(states[k][mask].float(), before[k][mask].float(), dim=-1) for k in self.layers]
        return torch.stack(cosines).relu().mean()

    def retained(self, context: Context, batch: Batch) -> Tensor:
        """Mean L2 distance to the representations before."""
        return hidden_distance(*hidden_states(context, batch))


def hidden_states(context: Context, batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
    """After each decoder layer, now and before training, (batch, time, hidden); and where there are tokens."""
    now, before = context.hidden_states(batch), context.hidden_states_before(batch)
    return now[1:], before[1:], batch.attention_mask.bool()
