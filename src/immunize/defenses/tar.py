"""TAR: resist fine-tuning by training against simulated attackers (Tamirisa et al., ICLR 2025, Algorithm 1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import Batch, PairedBatch
from immunize.models.predictions import Predictions
from immunize.seeding import derive
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.losses import cross_entropy, entropy, hidden_distance, log_probabilities
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class TAR(AlignmentDefense):
    """Minimizes  retain_weight (r(w) + representation_weight d(w)) + resistance_weight sum_k exp(late (k - K)) t(w_k).

    r is the loss of benign conversations (token mean, nats), and d the distance of their hidden states from those
    before training: L2 norms, averaged over layers and tokens. w_k are the weights after k of `inner_steps` = K steps
    of an attacker, who runs AdamW on harmful answers from w at one of `inner_rates`; k runs over the multiples of
    `every`. The gradient at w_k is taken for that at w (first order), and w is restored to the bit. t is that of a
    held-out batch, the same at all k of one attacker:

    - `entropy`: minus the entropy of the predicted answer tokens (nats), the paper's choice against harmful knowledge;
    - `preference`: the DPO loss of refusals over harmful answers, with `preference_beta` against the model before
      training, its choice for the refusal of harmful requests.

    Ours: only answer tokens count in the entropy, where the paper's code averages over prompt and padding too; all
    attackers draw on one set of harmful answers, a held-out batch being one that the attacker draws at another time;
    none starts with benign data or warms up; the outer optimizer is `tuning`'s, not a schedule-free one; no random
    mapping before and no chat training after it. The attacker moves the same parameters that are trained.
    resistance_weight = representation_weight = 0 is supervised fine-tuning on the benign conversations.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("paired",)
    retain_weight: float = 1.0
    representation_weight: float = 1.0
    resistance_weight: float = 4.0
    objective: Literal["entropy", "preference"]
    preference_beta: float = 0.1
    inner_steps: int
    inner_rates: tuple[float, ...]
    every: int = 4
    late: float = 0.0625

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("representation_weight", "resistance_weight", "late"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("retain_weight", "preference_beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if not 1 <= self.every <= self.inner_steps:
            raise ValueError(f"every={self.every}: must lie between 1 and inner_steps={self.inner_steps}")
        if not self.inner_rates or min(self.inner_rates) < 0:
            raise ValueError(f"inner_rates={list(self.inner_rates)}: must be one learning rate or more, none negative")

    @property
    def passes(self) -> float:
        """The attacker's, those at w_k, that of the benign batch; and the forward passes of the model before."""
        preference = self.objective == "preference"
        tampered = self.inner_steps // self.every * (1 + preference)
        return self.inner_steps + tampered + 1 + (bool(self.representation_weight) + 2 * preference) / 3

    def setup(self, context: Context) -> None:
        if self.representation_weight or self.objective == "preference":
            context.keep_reference()

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, PairedBatch)
        grads = self.resistance(context, batch) if self.resistance_weight else None
        return StepOut(loss=self.retain_weight * self.retained(context), grads=grads)

    def retained(self, context: Context) -> Tensor:
        """r + representation_weight d, on a batch of benign conversations."""
        batch, near = context.draw("retain"), bool(self.representation_weight)
        found = context.predict(batch, hidden_states=near)
        loss = cross_entropy(found)
        if not near:
            return loss
        before = context.hidden_states_before(batch)
        distance = hidden_distance(found.states[1:], before[1:], batch.attention_mask.bool())
        return loss + self.representation_weight * distance

    def resistance(self, context: Context, held_out: PairedBatch) -> dict[str, Tensor]:
        """The gradient of the last term of the objective, by one attacker."""
        rate = self.inner_rates[derive(context.seed, "attacker", context.step) % len(self.inner_rates)]
        margin = self.preferred(context.predict_before, held_out) if self.objective == "preference" else None
        found: dict[str, Tensor] = {}
        with context.same_rng(), context.at({}):
            attacker = torch.optim.AdamW(list(context.params().values()), lr=rate, weight_decay=0.0)
            for k in range(1, self.inner_steps + 1):
                context.update(attacker, context.grad(context.ce(context.draw("paired").harmful)))
                if k % self.every:
                    continue
                weight = self.resistance_weight * math.exp(self.late * (k - self.inner_steps))
                for name, grad in context.grad(self.tampered(context, held_out, margin)).items():
                    found[name] = found[name] + weight * grad if name in found else weight * grad
        return found

    def tampered(self, context: Context, batch: PairedBatch, margin: Tensor | None) -> Tensor:
        """t, at the weights as they are."""
        if margin is None:
            return -entropy(context.predict(batch.harmful))
        return -F.logsigmoid(self.preference_beta * (self.preferred(context.predict, batch) - margin)).mean()

    @staticmethod
    def preferred(predict: Callable[[Batch], Predictions], batch: PairedBatch) -> Tensor:
        """How much likelier the refusal is than the harmful answer, for each pair (nats): (batch,)."""
        predictions = [predict(side) for side in (batch.refusal, batch.harmful)]
        refusal, harmful = (found.sum_per_row(log_probabilities(found)) for found in predictions)
        return refusal - harmful
