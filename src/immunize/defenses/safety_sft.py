"""Safety SFT: supervised fine-tuning on refusals. The control without which no alignment-stage claim counts."""

from dataclasses import dataclass
from typing import ClassVar

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class SafetySFT(AlignmentDefense):
    """Minimizes the loss of refusals to harmful prompts, and that of benign conversations beside it."""

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("refusals",)
    retain_weight: float = 1.0

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        return StepOut(loss=self.with_retain(context, context.ce(batch)))
