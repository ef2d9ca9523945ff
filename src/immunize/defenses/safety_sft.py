"""Safety SFT: supervised fine-tuning on refusals. The control without which no alignment-stage claim counts."""

from dataclasses import dataclass
from typing import ClassVar

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class SafetySFT(AlignmentDefense):
    """Minimizes the loss of refusals to harmful prompts, plus `retain_weight` times that of benign conversations.

    Without retain data a model forgets how to chat and refuses too much.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("refusals", "retain")
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.retain_weight < 0:
            raise ValueError(f"retain_weight={self.retain_weight}: must not be negative")

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        loss = context.ce(batch)
        if self.retain_weight:
            loss = loss + self.retain_weight * context.ce(context.draw("retain"))
        return StepOut(loss=loss)
