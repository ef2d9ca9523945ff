"""LoX: go on in the low-rank directions in which alignment has moved the weights (Perin et al., COLM 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunize.models.loading import load_base
from immunize.models.sources import ModelSource
from immunize.training.context import Context
from immunize.training.defense import WeightEdit


def low_rank(matrix: Tensor, rank: int | None) -> Tensor:
    """The best approximation of that rank, in the Frobenius norm; None is the matrix itself."""
    if rank is None:
        return matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]


@dataclass(frozen=True, kw_only=True)
class LoX(WeightEdit):
    """Adds  scale x [W - W0]_rank  to every weight matrix W, embeddings included; vectors stay.

    W0 is the same matrix of `base`, the unaligned model, and [.]_rank the best approximation of that rank (null: the
    whole difference, as in the paper's code by default). The difference is taken in float32, where the code takes it
    in the dtype of the weights, which leaves it about three digits in half precision. Beyond a scale of 2 to 3 models
    tend to break. scale = 0 changes nothing, and neither does a model that is its own base.
    """

    version: ClassVar[int] = 1
    base: ModelSource | None
    rank: int | None = 6
    scale: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is None:
            raise ValueError("base=null: the unaligned model is needed; name it as model.base, or here")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1, or null for the whole difference")
        if self.scale < 0:
            raise ValueError(f"scale={self.scale}: must not be negative; it would undo the alignment")

    def finish(self, context: Context) -> None:
        assert self.base is not None
        unaligned = dict(load_base(self.base, device=str(context.chat.device)).network.named_parameters())
        for name, weight in context.matrices().items():
            if name not in unaligned or unaligned[name].shape != weight.shape:
                raise ValueError(f"base={self.base.name}: has no {name} of shape {tuple(weight.shape)} to compare with")
            difference = weight.float() - unaligned[name].detach().float()
            context.edit(name, self.scale * low_rank(difference, self.rank))
