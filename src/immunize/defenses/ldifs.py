"""LDIFS: keep the features of every layer near those before the tuning (Mukhoti et al., TMLR 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunize.data.batches import Batch, PairedBatch
from immunize.training.context import Context
from immunize.training.defense import FinetuningDefense
from immunize.training.losses import cross_entropy
from immunize.training.method import StepOut


@dataclass(frozen=True, kw_only=True)
class LDIFS(FinetuningDefense):
    """Minimizes  g + weight mean |z - z0|^2 / d  on the user's batch.

    g is its loss (token mean, nats), z are the outputs of the MLPs, z0 those of the network before the tuning, in eval
    mode, and d is their width; the mean is over layers and tokens, prompts included and padding not.

    The paper has image encoders; this follows its form for language models, the baseline of Huang et al. (Antidote,
    ICML 2025), but for three things. There the squares are summed over layers, tokens and dimensions, with weight
    0.0001 / 2, so that it depends on the size of model and batch; padding counts; and a layer's sum is left out of the
    loss when it is 0.1 or more, which frees those layers that have drifted.

    weight = 0 is supervised fine-tuning.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("main",)
    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: must not be negative")

    @property
    def passes(self) -> float:
        """One, and a forward pass of the model before."""
        return 4 / 3 if self.weight else 1.0

    def setup(self, context: Context) -> None:
        if self.weight:
            context.keep_reference()

    def step(self, context: Context, batch: Batch | PairedBatch) -> StepOut:
        assert isinstance(batch, Batch)
        if not self.weight:
            return StepOut(loss=context.ce(batch))
        with context.taps("mlp", reference=True) as before:
            context.hidden_states_before(batch)
        with context.taps("mlp") as now:
            found = context.predict(batch)
        drift = feature_distance(now, before, batch.attention_mask.bool())
        return StepOut(loss=cross_entropy(found) + self.weight * drift)


def feature_distance(now: Mapping[str, Tensor], before: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Mean square of the difference over sites, the tokens of `mask` (batch, time) and dimensions."""
    squares = [(now[name] - before[name])[mask].float().square().mean() for name in now]
    return torch.stack(squares).mean()
