"""Losses over the tokens that carry a label. Logits are read in float32, whatever the model's dtype."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import IGNORED


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Position t predicts token t + 1: (batch, time - 1, vocabulary) and (batch, time - 1)."""
    return logits[:, :-1].float(), labels[:, 1:]


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens of the whole batch (nats); zero where there are none.

    `weights` (batch, time), aligned with `labels`, makes it a weighted mean.
    """
    predicted, targets = _next_token(logits, labels)
    if weights is None:
        total = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)
    losses = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    kept = weights[:, 1:].flatten() * (targets.flatten() != IGNORED)
    return (losses * kept).sum() / kept.sum().clamp(min=torch.finfo(torch.float32).tiny)


def log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and whether there is one: both (batch, time - 1); zero where there is none."""
    predicted, targets = _next_token(logits, labels)
    mask = targets != IGNORED
    chosen = predicted.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (chosen - predicted.logsumexp(-1)) * mask, mask


def mean_loss_per_row(logits: Tensor, labels: Tensor) -> Tensor:
    """Token-mean loss of each row (nats): (batch,)."""
    log_p, mask = log_probabilities(logits, labels)
    return -log_p.sum(1) / mask.sum(1).clamp(min=1)


def kl_divergence(reference_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean KL(reference || model) over the vocabulary at the positions that predict labelled tokens (nats)."""
    reference, targets = _next_token(reference_logits, labels)
    predicted, _ = _next_token(logits, labels)
    reference_log = reference.log_softmax(-1)
    divergence = (reference_log.exp() * (reference_log - predicted.log_softmax(-1))).sum(-1)
    mask = targets != IGNORED
    return (divergence * mask).sum() / mask.sum().clamp(min=1)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean entropy of the prediction at the positions that predict labelled tokens (nats)."""
    predicted, targets = _next_token(logits, labels)
    log_p = predicted.log_softmax(-1)
    mask = targets != IGNORED
    return (-(log_p.exp() * log_p).sum(-1) * mask).sum() / mask.sum().clamp(min=1)


def bounded_ascent(logits: Tensor, labels: Tensor, *, floor: float = -15.0) -> Tensor:
    """Mean of -log(1 - p) over labelled tokens with log p above `floor`: at least 0, reached as p goes to 0.

    log(1 - p) is the log-sum-exp over the vocabulary without the label, less that over all of it: log1p(-softmax)
    loses its digits where p is near 1.
    """
    predicted, targets = _next_token(logits, labels)
    log_p, mask = log_probabilities(logits, labels)
    label = F.one_hot(targets.clamp(min=0), predicted.shape[-1]).bool()
    log_rest = predicted.masked_fill(label, -torch.inf).logsumexp(-1) - predicted.logsumexp(-1)
    kept = mask & (log_p > floor)
    return -(log_rest * kept).sum() / kept.sum().clamp(min=1)


def hidden_distance(states: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean L2 distance of hidden states over all depths and the tokens of `mask` (batch, time)."""
    pairs = zip(states, reference, strict=True)
    return torch.stack([(state - other)[mask].float().norm(dim=-1).mean() for state, other in pairs]).mean()
