"""The trivial twins of defenses: as much noise as asked for, as many zeros, and nothing cleverer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.defenses.pruning import Pruning
from immunize.defenses.random_perturbation import RandomPerturbation
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.defense import WeightEdit

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


def change(context: Context, method: WeightEdit) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every parameter before and after."""
    before = {name: parameter.detach().clone() for name, parameter in context.network.named_parameters()}
    method.finish(context)
    return before, dict(context.network.named_parameters())


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_noise_has_the_share_of_each_norm(share: float, context: Context) -> None:
    before, after = change(context, RandomPerturbation(share=share))
    noises = []
    for name, weight in before.items():
        noise = after[name].detach() - weight
        if weight.ndim == 1:
            assert not noise.any()
            continue
        assert (noise.norm() / weight.norm()).item() == pytest.approx(share, rel=1e-4)
        noises.append(noise.flatten()[:2000] / noise.std())
    assert torch.cat(noises).mean().abs() < 0.05
    assert abs(torch.corrcoef(torch.stack([noise[:512] for noise in noises]))[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, [[0.0, 5.0, -2.0, 3.0]]), (0.5, [[0.0, 5.0, 0.0, 3.0]]), (0.75, [[0.0, 5.0, 0.0, 0.0]])],
)
def test_smallest_entries_go_by_hand(share: float, expected: list[list[float]]) -> None:
    """Of (-1, 5, -2, 3): first -1, then -2, then 3, whatever their sign."""
    assert pruned(torch.tensor([[-1.0, 5.0, -2.0, 3.0]]), share) == expected


def test_ties_are_broken_by_order_and_the_count_is_exact() -> None:
    assert pruned(torch.full((2, 4), 7.0), 0.375) == [[0.0, 0.0, 0.0, 7.0], [7.0, 7.0, 7.0, 7.0]]


def pruned(weight: Tensor, share: float) -> list[list[float]]:
    """One matrix, by magnitude."""
    network: Any = torch.nn.Module()
    network.matrix = torch.nn.Parameter(weight)
    context = Context(ChatModel(network=network, tokenizer=None), streams={}, seed=0, steps=0)
    Pruning(share=share, criterion="magnitude").finish(context)
    return network.matrix.tolist()


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("share", [0.1, 0.33])
def test_as_many_zeros_as_asked_for_and_nothing_else(criterion: Any, share: float, context: Context) -> None:
    before, after = change(context, Pruning(share=share, criterion=criterion))
    for name, weight in before.items():
        zeros = after[name] == 0
        assert zeros.sum() == (round(share * weight.numel()) if weight.ndim > 1 else 0)
        assert torch.equal(after[name][~zeros], weight[~zeros])
        if criterion == "magnitude" and weight.ndim > 1:
            assert weight[zeros].abs().max() <= weight[~zeros].abs().min()


def test_random_zeros_lie_anywhere(context: Context) -> None:
    """Not among the small entries, and elsewhere in each matrix and under each seed."""
    before, after = change(context, Pruning(share=0.5, criterion="random"))
    zeros = {name: after[name] == 0 for name in before if before[name].ndim > 1}
    chosen = before[MATRIX][zeros[MATRIX]].abs().mean() / before[MATRIX].abs().mean()
    assert chosen.item() == pytest.approx(1.0, abs=0.1)
    other = zeros[MATRIX.replace("layers.1", "layers.0")]
    assert (zeros[MATRIX] == other).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share={share}: must lie in \[0, 1\)"):
        Pruning(share=share, criterion="random")
    with pytest.raises(ValueError, match=r"share=-0.1: must not be negative"):
        RandomPerturbation(share=-0.1)
