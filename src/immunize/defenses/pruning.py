"""Pruning: zeroes in the weights, at random or where they are smallest; the trivial twin of defenses that prune."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from immunize.training.context import Context
from immunize.training.defense import WeightEdit


@dataclass(frozen=True, kw_only=True)
class Pruning(WeightEdit):
    """Sets `share` of the entries of every weight matrix, embeddings included, to zero; the count is rounded.

    `criterion` says which: `random` ones, by the run's seed and the matrix's name, or those of least `magnitude`, a
    tie being broken by their order. A defense that prunes and does no better than this has found nothing. share = 0
    changes nothing.
    """

    version: ClassVar[int] = 1
    share: float
    criterion: Literal["random", "magnitude"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share}: must lie in [0, 1); it is the share of entries that become zero")

    def finish(self, context: Context) -> None:
        for name, weight in context.matrices().items():
            # Drawn in float32: half precision has so few values that ties would decide.
            ranks = weight.abs() if self.criterion == "magnitude" else context.normal_like(weight.float(), name)
            pruned = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            pruned[ranks.flatten().sort(stable=True).indices[: round(self.share * weight.numel())]] = True
            context.edit(name, -weight * pruned.view_as(weight))
