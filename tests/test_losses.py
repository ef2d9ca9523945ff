"""Losses, against loops over single tokens in float64; at every position and packed alike."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.data.batches import IGNORED
from immunize.models.predictions import Predictions, at_every_position
from immunize.training import losses

ROWS, TIME, VOCABULARY = 3, 7, 11
Loss = Callable[..., Tensor]


def packed(found: Predictions) -> Predictions:
    """What `predict` makes where the vocabulary is large: only the rows with a label."""
    return replace(found, logits=found.logits[found.labelled], targets=found.targets[found.labelled])


def both_ways(loss: Callable[..., Tensor]) -> Loss:
    """The loss at every position, after a look that its value and its gradient are the same when packed."""

    def compared(logits: Tensor, labels: Tensor, *others: Any, **options: Any) -> Tensor:
        dense = at_every_position(logits, labels)
        value, other = loss(dense, *others, **options), loss(packed(dense), *others, **options)
        torch.testing.assert_close(other, value)
        if logits.requires_grad:
            pair = [torch.autograd.grad(item.sum(), logits, retain_graph=True)[0] for item in (value, other)]
            torch.testing.assert_close(*pair)
        return value

    return compared


cross_entropy = both_ways(losses.cross_entropy)
entropy = both_ways(losses.entropy)
bounded_ascent = both_ways(losses.bounded_ascent)
mean_loss_per_row = both_ways(losses.mean_loss_per_row)


def kl_divergence(reference: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    def between(found: Predictions) -> Tensor:
        before = at_every_position(reference, labels)
        return losses.kl_divergence(packed(before) if found.packed else before, found)

    return both_ways(between)(logits, labels)


def divergence(logits: Tensor, labels: Tensor) -> Tensor:
    return kl_divergence(random_logits(9, rows=len(logits), time=logits.shape[1]), logits, labels)


LOSSES: list[Loss] = [cross_entropy, entropy, bounded_ascent, divergence]


def random_logits(seed: int, *, rows: int = ROWS, time: int = TIME) -> Tensor:
    return torch.randn(rows, time, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0)


@pytest.fixture
def labels() -> Tensor:
    """Rows with five, three and no labels."""
    made = torch.randint(VOCABULARY, (ROWS, TIME), generator=torch.Generator().manual_seed(1))
    made[0, :2] = made[1, :3] = made[1, 6:] = made[2] = IGNORED
    return made


def predictions(logits: Tensor, labels: Tensor) -> list[tuple[int, int, list[float], int]]:
    """(row, column of the label, probabilities, label), one token after the other."""
    found = []
    for row in range(labels.shape[0]):
        for column in range(1, labels.shape[1]):
            if labels[row, column] != IGNORED:
                exponentials = [math.exp(value) for value in logits[row, column - 1].double().tolist()]
                probabilities = [value / sum(exponentials) for value in exponentials]
                found.append((row, column, probabilities, int(labels[row, column])))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_cross_entropy_is_the_mean_over_all_labelled_tokens(logits: Tensor, labels: Tensor) -> None:
    expected = mean([-math.log(p[label]) for _, _, p, label in predictions(logits, labels)])
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_weights_make_a_weighted_mean(logits: Tensor, labels: Tensor) -> None:
    weights = torch.rand((ROWS, TIME - 1), generator=torch.Generator().manual_seed(2))
    tokens = predictions(logits, labels)
    total = sum(-math.log(p[label]) * weights[row, column - 1].item() for row, column, p, label in tokens)
    expected = total / sum(weights[row, column - 1].item() for row, column, _, _ in tokens)
    assert cross_entropy(logits, labels, weights).item() == pytest.approx(expected, rel=1e-6)
    plain = cross_entropy(logits, labels)
    assert cross_entropy(logits, labels, torch.full_like(weights, 0.3)).item() == pytest.approx(plain.item(), rel=1e-6)
    assert cross_entropy(logits, labels, torch.zeros_like(weights)).item() == 0


def test_log_probabilities_and_row_means(logits: Tensor, labels: Tensor) -> None:
    found = at_every_position(logits, labels)
    log_p, mask = losses.log_probabilities(found), found.labelled
    assert torch.equal(losses.log_probabilities(packed(found)), log_p[mask])
    rows: dict[int, list[float]] = {0: [], 1: []}
    for row, column, p, label in predictions(logits, labels):
        assert log_p[row, column - 1].item() == pytest.approx(math.log(p[label]), rel=1e-5)
        rows[row].append(-math.log(p[label]))
    assert mask.tolist() == (labels[:, 1:] != IGNORED).tolist()
    assert not log_p[~mask].any()
    expected = [mean(rows[0]), mean(rows[1]), 0]
    assert mean_loss_per_row(logits, labels).tolist() == pytest.approx(expected, rel=1e-6)


def test_kl_divergence_is_that_of_reference_from_model(logits: Tensor, labels: Tensor) -> None:
    reference = random_logits(3)
    pairs = zip(predictions(reference, labels), predictions(logits, labels), strict=True)
    expected = mean([sum(r * math.log(r / p) for r, p in zip(one[2], other[2], strict=True)) for one, other in pairs])
    assert kl_divergence(reference, logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(logits, reference, labels).item() != pytest.approx(expected, rel=1e-2)
    assert kl_divergence(logits, logits + 5, labels).item() == pytest.approx(0, abs=1e-6)


def test_entropy_is_at_most_the_logarithm_of_the_vocabulary(logits: Tensor, labels: Tensor) -> None:
    """Reached at uniform logits."""
    expected = mean([-sum(value * math.log(value) for value in p) for _, _, p, _ in predictions(logits, labels)])
    assert entropy(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert expected < math.log(VOCABULARY)
    assert entropy(torch.full_like(logits, 4.0), labels).item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert entropy(logits * 1e6, labels).item() == pytest.approx(0, abs=1e-6)


def test_bounded_ascent_counts_likely_labels_only(logits: Tensor, labels: Tensor) -> None:
    """A floor in the middle of the log-probabilities drops the tokens below from sum and count."""
    tokens = predictions(logits, labels)
    ordered = sorted(math.log(p[label]) for _, _, p, label in tokens)
    for floor in (-15.0, (ordered[2] + ordered[3]) / 2):
        expected = mean([-math.log1p(-p[label]) for _, _, p, label in tokens if math.log(p[label]) > floor])
        assert bounded_ascent(logits, labels, floor=floor).item() == pytest.approx(expected, rel=1e-5)


def test_bounded_ascent_is_bounded_below(labels: Tensor) -> None:
    """Zero as the labels' logits go to minus infinity; finite, with a finite gradient, as they go to plus infinity."""
    label = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), VOCABULARY).float()
    values = []
    for scale in (-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4):
        logits = torch.cat([label * scale, torch.zeros(ROWS, 1, VOCABULARY)], dim=1).requires_grad_()
        value = bounded_ascent(logits, labels)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all()
        values.append(value.item())
    assert values[:2] == [0, 0]
    assert values == sorted(values)
    # p = e^s / (e^s + V - 1), so -log(1 - p) is s - log(V - 1) far out: no digits are lost near p = 1
    assert values[-2:] == pytest.approx([100 - math.log(VOCABULARY - 1), 1e4 - math.log(VOCABULARY - 1)], rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_labels_give_zero_and_a_zero_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, torch.full_like(labels, IGNORED))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_predicts_no_label_changes_nothing(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    """Logits at other positions, the first column's label, and the gradient there."""
    changed = logits.clone()
    silent = torch.cat([labels[:, 1:] == IGNORED, torch.ones(ROWS, 1, dtype=torch.bool)], dim=1)
    changed[silent] = 77.0
    expected = loss(logits, labels).item()
    assert loss(changed, labels).item() == pytest.approx(expected, rel=1e-6)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, labels), leaf)
    assert not gradient[silent].any()
    assert gradient[~silent].any(-1).all()


@pytest.mark.parametrize("loss", [cross_entropy, entropy, bounded_ascent])
def test_padding_columns_change_nothing(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    wide_logits = torch.cat([logits, random_logits(5)], dim=1)
    wide_labels = torch.cat([labels, torch.full_like(labels, IGNORED)], dim=1)
    assert loss(wide_logits, wide_labels).item() == pytest.approx(loss(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_read_in_float32(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    rounded = logits.bfloat16()
    assert loss(rounded, labels).dtype is torch.float32
    assert torch.equal(loss(rounded, labels), loss(rounded.float(), labels))
