"""Losses over the tokens that carry a label."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import IGNORED
from immunize.models.predictions import Predictions


def cross_entropy(found: Predictions, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens of the whole batch (nats); zero where there are none.

    `weights` (batch, time - 1), aligned with the tokens that are predicted, makes it a weighted mean.
    """
    logits, targets = found.logits.flatten(0, -2), found.targets.flatten()
    if weights is None:
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    kept = found.like_targets(weights).flatten() * (targets != IGNORED)
    return (losses * kept).sum() / kept.sum().clamp(min=torch.finfo(torch.float32).tiny)


def log_probabilities(found: Predictions) -> Tensor:
    """Log-probability of each label, in the shape of `found.targets`; zero where there is none."""
    chosen = found.logits.gather(-1, found.targets.clamp(min=0)[..., None])[..., 0]
    return (chosen - found.logits.logsumexp(-1)) * (found.targets != IGNORED)


def mean_loss_per_row(found: Predictions) -> Tensor:
    """Token-mean loss of each row (nats): (batch,)."""
    return -found.sum_per_row(log_probabilities(found)) / found.labelled.sum(1).clamp(min=1)


def kl_divergence(reference: Predictions, found: Predictions) -> Tensor:
    """Mean KL(reference || model) over the vocabulary at the positions that predict labelled tokens (nats)."""
    reference_log = reference.logits.log_softmax(-1)
    divergence = (reference_log.exp() * (reference_log - found.logits.log_softmax(-1))).sum(-1)
    return _mean(divergence, found)


def entropy(found: Predictions) -> Tensor:
    """Mean entropy of the prediction at the positions that predict labelled tokens (nats)."""
    log_p = found.logits.log_softmax(-1)
    return _mean(-(log_p.exp() * log_p).sum(-1), found)


def bounded_ascent(found: Predictions, *, floor: float = -15.0) -> Tensor:
    """Mean of -log(1 - p) over labelled tokens with log p above `floor`: at least 0, reached as p goes to 0.

    log(1 - p) is the log-sum-exp over the vocabulary without the label, less that over all of it: log1p(-softmax)
    loses its digits where p is near 1.
    """
    label = F.one_hot(found.targets.clamp(min=0), found.logits.shape[-1]).bool()
    log_rest = found.logits.masked_fill(label, -torch.inf).logsumexp(-1) - found.logits.logsumexp(-1)
    kept = (found.targets != IGNORED) & (log_probabilities(found) > floor)
    return -(log_rest * kept).sum() / kept.sum().clamp(min=1)


def _mean(values: Tensor, found: Predictions) -> Tensor:
    mask = found.targets != IGNORED
    return (values * mask).sum() / mask.sum().clamp(min=1)


def hidden_distance(states: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean L2 distance of hidden states over all depths and the tokens of `mask` (batch, time)."""
    pairs = zip(states, reference, strict=True)
    return torch.stack([(state - other)[mask].float().norm(dim=-1).mean() for state, other in pairs]).mean()
