"""Safe LoRA: project the user's change of the weights into what alignment has changed (Hsu et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from immunize.models.loading import load_base
from immunize.models.sources import ModelSource
from immunize.training.context import Context
from immunize.training.defense import PostDefense

Projector = Literal["paper", "orthogonal"]


def projector_root(alignment: Tensor, projector: Projector, rank: int) -> Tensor:
    """F with C = F F^T: (outputs, inputs) -> (outputs, k). C itself would have the square of the outputs."""
    if projector == "paper":
        return alignment / alignment.norm().sqrt()
    left, values, _ = torch.linalg.svd(alignment, full_matrices=False)
    directions = int((values > values[0] * 1e-6).sum())  # beyond, they are rounding
    return left[:, : min(rank, directions)]


@dataclass(frozen=True, kw_only=True)
class SafeLoRA(PostDefense):
    """Replaces the user's change dW of a matrix by C dW, where the two differ much in direction.

    V = W_aligned - W_base is what alignment has changed: W_aligned is the matrix at the start of the user's tuning,
    and W_base the same matrix, by name, of `base`, the unaligned model; both in float32.

    projector: `paper` is C = V V^T / ||V||_F, which is no projection: applied twice it is another map,
    and 10 V gives 10 C, so that it scales dW by what alignment has moved. `orthogonal` is U U^T, of the first `rank`
    left singular vectors of V; `rank` is of that one alone.

    threshold: those matrices are projected for which cos(C dW, dW) is at most this; the cosine is never negative, so
    that 1 is all of them and -1 none, which changes nothing. layers: instead, the so many matrices of lowest cosine.

    The change counts as a matrix, also that of an adapter, where the paper multiplies the second factor: the same up
    to rounding. In full-parameter tuning every matrix has one; of an embedding, whose rows are its inputs, the columns
    are projected. Vectors stay, and so does a matrix that alignment or the user has not moved.
    """

    version: ClassVar[int] = 1
    base: ModelSource | None
    projector: Projector = "paper"
    rank: int = 6
    threshold: float = 0.5
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.base is None:
            raise ValueError("base=null: the unaligned model is needed; name it as model.base, or here")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: is a cosine and must lie in [-1, 1]")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers={self.layers}: must be at least 1, or null for the threshold")

    def setup(self, context: Context) -> None:
        """The base is read once, and before the tuning, so that one that does not match is refused early."""
        assert self.base is not None
        context.keep_start()
        unaligned = dict(load_base(self.base, device=str(context.chat.device)).network.named_parameters())
        roots, embeddings = {}, context.embeddings()
        for name, aligned in context.start().items():
            if name not in unaligned or unaligned[name].shape != aligned.shape:
                raise ValueError(
                    f"base={self.base.name}: has no {name} of shape {tuple(aligned.shape)} to compare with"
                )
            alignment = aligned - unaligned[name].detach().float()
            if alignment.any():
                alignment = alignment.T if name in embeddings else alignment
                roots[name] = projector_root(alignment, self.projector, self.rank)
        context.state.roots = roots

    def finish(self, context: Context) -> None:
        embeddings, edits, cosines = context.embeddings(), {}, {}
        for name, change in context.change().items():
            if name not in context.state.roots or not change.any():
                continue
            root = context.state.roots[name]
            projected = (root @ (root.T @ change.T)).T if name in embeddings else root @ (root.T @ change)
            norms = (projected.norm() * change.norm()).clamp(min=torch.finfo(torch.float32).tiny)
            cosines[name] = min(1.0, ((projected * change).sum() / norms).item())
            edits[name] = projected - change
        if self.layers is None:
            chosen = [name for name, cosine in cosines.items() if cosine <= self.threshold]
        else:
            chosen = sorted(cosines, key=lambda name: (cosines[name], name))[: self.layers]
        for name in chosen:
            context.edit(name, edits[name])
