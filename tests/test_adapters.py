"""Low-rank adapters: what is frozen stays, a fresh one is zero, merged and saved ones compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.models import adapters
from immunize.models.loading import ChatModel, load_folder
from immunize.training.method import Method
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
LORA = LoRA(rank=2, alpha=8.0)
CONTINUED = LoRA(rank=2, alpha=8.0, adapter="continued")
IDS = torch.arange(4, 16)[None]


@torch.no_grad()
def logits(chat: ChatModel) -> Tensor:
    return chat.network(input_ids=IDS).logits


def train(chat: ChatModel, roles: dict[str, Any], trainable: LoRA = LORA, *, steps: int = 3, **options: Any) -> None:
    optimizer = Optimizer(weight_decay=0.1)
    tuning = Tuning(learning_rate=0.05, steps=steps, batch_size=4, optimizer=optimizer, trainable=trainable)
    tune(chat, Method(), roles=roles, tuning=tuning, seed=0, **options)


@pytest.fixture
def defended(make_chat: MakeChat, roles: dict[str, Any], tmp_path: Path) -> ChatModel:
    """A model with a trained adapter, saved alone to `adapter` and folded into the weights in `weights`."""
    chat = make_chat()
    train(chat, roles)
    adapters.save_adapter(chat, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert '"base_model_name_or_path": null' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    adapters.merge(chat)
    chat.save(tmp_path / "weights")
    return chat


def test_fresh_adapter_changes_no_logit(make_chat: MakeChat) -> None:
    chat = make_chat()
    expected = logits(chat)
    prepare_trainable(chat, LORA, seed=0)
    assert adapters.is_adapted(chat)
    assert torch.equal(logits(chat), expected)


def test_frozen_weights_keep_their_bits(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    """With weight decay; and every factor of the adapter is trained."""
    chat, untouched = make_chat(), make_chat()
    train(chat, roles)
    base = chat.network.get_base_model()
    for name, parameter in untouched.network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = base.get_submodule(owner)
        kept = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        assert torch.equal(getattr(kept, leaf), parameter), name
    factors = [parameter for parameter in chat.network.parameters() if parameter.requires_grad]
    assert len(factors) == 3 * 7 * 2
    assert all(factor.any() for factor in factors)


def test_merged_computes_what_unmerged_does(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    chat = make_chat()
    before = logits(chat)
    train(chat, roles)
    expected = logits(chat)
    adapters.merge(chat)
    assert not adapters.is_adapted(chat)
    torch.testing.assert_close(logits(chat), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.1
    adapters.merge(chat)  # nothing left to do


def test_scale_is_alpha_over_rank(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    """The merged matrix is W + alpha / rank B A."""
    name, chat = "model.layers.1.mlp.up_proj", make_chat()
    weight = chat.network.get_submodule(name).weight.detach().clone()
    train(chat, roles)
    layer = chat.network.get_base_model().get_submodule(name)
    expected = weight + 8.0 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    adapters.merge(chat)
    torch.testing.assert_close(chat.network.get_submodule(name).weight, expected)


@pytest.mark.parametrize("trainable", [LORA, CONTINUED, FullParameter()])
def test_attack_starts_from_the_defended_model(trainable: Any, defended: ChatModel, tmp_path: Path) -> None:
    """Whichever adapter is trained: one that goes on must not count twice, in the weights and on top of them."""
    chat = load_folder(tmp_path / "weights", dtype="float32", device="cpu")
    expected = logits(defended)
    assert torch.equal(logits(chat), expected)
    prepare_trainable(chat, trainable, seed=0, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(chat), expected, rtol=1e-4, atol=1e-4)


def test_continued_adapter_is_that_of_the_defense(
    defended: ChatModel, tmp_path: Path, roles: dict[str, Any], make_chat: MakeChat
) -> None:
    """Its factors start where the defense left them, over the weights that the defense started from; a fresh one is
    another, and trains to another model."""
    chat = load_folder(tmp_path / "weights", dtype="float32", device="cpu")
    prepare_trainable(chat, CONTINUED, seed=0, adapter=tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj"
    layer = chat.network.get_base_model().get_submodule(name)
    assert layer.lora_B["default"].weight.any() and layer.lora_B["default"].weight.requires_grad
    torch.testing.assert_close(layer.get_base_layer().weight, make_chat().network.get_submodule(name).weight)
    found = []
    for trainable in (CONTINUED, LORA):
        chat = load_folder(tmp_path / "weights", dtype="float32", device="cpu")
        train(chat, roles, trainable, adapter=tmp_path / "adapter")
        found.append(logits(chat))
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_continued_without_an_earlier_adapter_starts_fresh(make_chat: MakeChat) -> None:
    """The control of a comparison has none."""
    chat = make_chat()
    expected = logits(chat)
    prepare_trainable(chat, CONTINUED, seed=0, adapter=None)
    assert torch.equal(logits(chat), expected)
    assert any(parameter.requires_grad for parameter in chat.network.parameters())


def test_full_parameter_after_an_adapter_trains_all(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    chat = make_chat()
    train(chat, roles)
    prepare_trainable(chat, FullParameter(), seed=0)
    assert not adapters.is_adapted(chat)
    assert all(parameter.requires_grad for parameter in chat.network.parameters())


def test_start_of_an_adapter_depends_on_the_seed_alone(make_chat: MakeChat) -> None:
    def start(seed: int) -> Tensor:
        chat = make_chat()
        prepare_trainable(chat, LORA, seed=seed)
        return chat.network.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.detach()

    torch.manual_seed(5)
    first = start(0)
    torch.manual_seed(6)
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


def test_targets_choose_the_matrices(make_chat: MakeChat) -> None:
    chat = make_chat()
    prepare_trainable(chat, LoRA(rank=2, targets=("q_proj", "v_proj")), seed=0)
    trained = [name for name, parameter in chat.network.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in trained)
    with pytest.raises(ValueError, match=r"trainable\.targets=.*nowhere"):
        prepare_trainable(make_chat(), LoRA(targets=("nowhere",)), seed=0)
