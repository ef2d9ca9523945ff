"""LoX: the extrapolation by hand, exact rank, and what it does where there is nothing to extrapolate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.config import build, load
from immunize.defenses.lox import LoX, low_rank
from immunize.models.loading import ChatModel
from immunize.models.sources import LocalModel, ShippedModel
from immunize.training.tune import tune

MakeChat = Callable[..., ChatModel]


def weights(chat: ChatModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in chat.network.named_parameters()}


@pytest.fixture(scope="module")
def base(make_chat: MakeChat, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = tmp_path_factory.mktemp("base")
    make_chat(seed=1).save(folder)
    return LocalModel(path=str(folder))


def edited(chat: ChatModel, **settings: Any) -> dict[str, Tensor]:
    method = LoX(**settings)
    spent = tune(chat, method, roles={}, tuning=method.tuning, seed=0)
    assert (spent.steps, spent.tokens) == (0, 0)
    return weights(chat)


def test_extrapolation_by_hand(make_chat: MakeChat, tmp_path: Path) -> None:
    """W - W0 = diag(4, 1) at one corner of a matrix, and nothing elsewhere: rank 1 keeps the 4, and 1.25 x 4 = 5."""
    chat, name = make_chat(), "model.layers.1.self_attn.q_proj.weight"
    chat.save(tmp_path)
    with torch.no_grad():
        chat.network.get_parameter(name)[0, 0] += 4
        chat.network.get_parameter(name)[1, 1] += 1
    before = weights(chat)
    after = edited(chat, base=LocalModel(path=str(tmp_path)), rank=1, scale=1.25)
    expected = before[name].clone()
    expected[0, 0] += 5
    torch.testing.assert_close(after.pop(name), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("rank", [1, 3, 40, None])
def test_edit_has_the_rank_and_is_the_best_of_it(rank: int | None, make_chat: MakeChat, base: LocalModel) -> None:
    """Its distance to the whole difference is that of the singular values left out; vectors are left alone."""
    chat, unaligned = make_chat(), weights(make_chat(seed=1))
    before = weights(chat)
    after = edited(chat, base=base, rank=rank, scale=0.5)
    for name, tensor in after.items():
        if tensor.ndim < 2:
            assert torch.equal(tensor, before[name])
            continue
        difference, edit = (before[name] - unaligned[name]).double(), (tensor - before[name]).double() / 0.5
        values = torch.linalg.svdvals(difference)
        kept = len(values) if rank is None else min(rank, len(values))
        assert torch.linalg.matrix_rank(edit, rtol=1e-4) == kept
        left_out = values[kept:].square().sum().sqrt().item()
        assert (difference - edit).norm().item() == pytest.approx(left_out, abs=1e-4)


def test_low_rank_by_hand() -> None:
    """[[3, 0], [4, 5]] has the singular values sqrt(45) and sqrt(5), and the first pair (1, 3) and (1, 1), scaled."""
    torch.testing.assert_close(
        low_rank(torch.tensor([[3.0, 0.0], [4.0, 5.0]]), 1), torch.tensor([[1.5, 1.5], [4.5, 4.5]])
    )
    stacked = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for one, matrix in zip(low_rank(stacked, 2), stacked, strict=True):
        torch.testing.assert_close(one, low_rank(matrix, 2))


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"own": True}])
def test_nothing_to_add_changes_no_bit(changes: Any, make_chat: MakeChat, base: LocalModel, tmp_path: Path) -> None:
    """At a scale of zero, and where the model is its own base."""
    chat = make_chat()
    if changes.pop("own", False):
        chat.save(tmp_path)
        base = LocalModel(path=str(tmp_path))
    before = weights(chat)
    assert all(torch.equal(tensor, before[name]) for name, tensor in edited(chat, base=base, **changes).items())


def test_difference_is_taken_in_full_precision(make_chat: MakeChat, base: LocalModel) -> None:
    """Of a model in half precision: the edit is that of the whole numbers, rounded once."""
    chat = make_chat()
    chat.network.bfloat16()
    before, unaligned = weights(chat), weights(make_chat(seed=1))
    after = edited(chat, base=base, rank=None, scale=1.0)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = before[name] + (before[name].float() - unaligned[name]).bfloat16()
    assert after[name].dtype is torch.bfloat16
    assert torch.equal(after[name], expected)


def test_base_of_another_shape_is_named(make_chat: MakeChat) -> None:
    with pytest.raises(ValueError, match=r"base=miniature/base: has no model.embed_tokens.weight of shape \(320, 32\)"):
        edited(make_chat(), base=ShippedModel(checkpoint="base"))


def test_base_is_that_of_the_model_and_is_asked_for_when_the_run_is_built() -> None:
    cell = build(load(["defense=lox"]))
    assert cell.defense["lox"].base == cell.model.base
    with pytest.raises(ValueError, match=r"defense.lox.base=null: the unaligned model is needed"):
        build(load(["defense=lox", "model.base=null"]))
    other = build(load(["defense=lox", "model.base.checkpoint=aligned"]))
    assert other.defense["lox"].base.checkpoint == "aligned"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 0}, "rank=0: must be at least 1, or null"), ({"scale": -1.0}, "scale=-1.0: must not be negative")],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoX(base=ShippedModel(checkpoint="base"), **changes)
