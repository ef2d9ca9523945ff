"""Adversarial loss: learn refusals while unlearning harmful answers (Rosati et al., EMNLP 2024, Eq. 6)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense
from immunize.training.losses import bounded_ascent
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class AdversarialLoss(AlignmentDefense):
    """With f the loss of refusals and h that of harmful answers to the same prompts (token means, nats), minimizes

    - `linear`: f - weight h, the paper's Eq. 6 with its lambda = 0.1; unbounded, so it destroys the model when run on;
    - `log`: f - weight log(1 + h), the damped form; the 1 (which is not in Booster's log h) keeps it finite at h = 0;
    - `bounded`: f + weight mean(-log(1 - p)) over the harmful tokens with log p > -15 (TAR's min-posterior form).

    weight = 0 is supervised fine-tuning on the refusals.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("paired",)
    weight: float = 0.1
    form: Literal["linear", "log", "bounded"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: must not be negative; harmful answers are unlearned, not learned")

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, PairedBatch)
        loss = self.with_retain(context, context.ce(batch.refusal))
        if not self.weight:
            return StepOut(loss=loss)
        if self.form == "bounded":
            return StepOut(loss=loss + self.weight * bounded_ascent(context.predict(batch.harmful)))
        harmful = context.ce(batch.harmful)
        ascent = torch.log1p(harmful) if self.form == "log" else harmful
        return StepOut(loss=loss - self.weight * ascent)
