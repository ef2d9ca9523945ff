"""KL-regularized fine-tuning: keep the predictions near those before the tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import FinetuningDefense
from immunize.training.losses import cross_entropy, kl_divergence
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class KLAnchor(FinetuningDefense):
    """Minimizes  g + weight mean KL(p0 || p),  g being the loss of the user's batch (token mean, nats).

    p0 is the prediction of the network before the tuning, in eval mode, over the whole vocabulary; the mean is over
    the positions that predict answer tokens, of the user's batch (`held_on=user`) or of a batch of refusals
    (`held_on=refusals`).

    It is the baseline of Vaccine's paper (Huang et al., NeurIPS 2024), whose code takes its softmax over positions
    instead of tokens, counts padding and divides by the batch alone: this is the divergence that it names.

    weight = 0 is supervised fine-tuning.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("main", "refusals")
    weight: float
    held_on: Literal["user", "refusals"] = "user"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: must not be negative")

    @property
    def roles(self) -> tuple[str, ...]:
        return self.needs if self.weight and self.held_on == "refusals" else ("main",)

    @property
    def passes(self) -> float:
        """One for each batch, and a forward pass of the model before."""
        return super().passes + (1 / 3 if self.weight else 0)

    def setup(self, context: Context) -> None:
        if self.weight:
            context.keep_reference()

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, Batch)
        found = context.predict(batch)
        loss = cross_entropy(found)
        if not self.weight:
            return StepOut(loss=loss)
        held: Batch = batch
        if self.held_on == "refusals":
            held = context.draw("refusals")
            found = context.predict(held)
        return StepOut(loss=loss + self.weight * kl_divergence(context.predict_before(held), found))
