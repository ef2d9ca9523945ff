"""Random perturbation: noise on the weights, the trivial twin of every defense that edits or moves them."""

from dataclasses import dataclass
from typing import ClassVar

from immunize.training.context import Context
from immunize.training.defense import WeightEdit


@dataclass(frozen=True, kw_only=True)
class RandomPerturbation(WeightEdit):
    """Adds normal noise to every weight matrix, embeddings included, of `share` times the matrix's Frobenius norm.

    A defense that does no better than noise of the norm of its own change has learned nothing. The noise follows from
    the run's seed and the matrix's name. share = 0 changes nothing.
    """

    version: ClassVar[int] = 1
    share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share < 0:
            raise ValueError(f"share={self.share}: must not be negative; it is a share of each matrix's norm")

    def finish(self, context: Context) -> None:
        for name, weight in context.matrices().items():
            noise = context.normal_like(weight, name).float()
            context.edit(name, noise * (self.share * weight.float().norm() / noise.norm()))
