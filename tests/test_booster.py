"""Booster: the update is the formula's on a quadratic, the weights come back to the bit, and the slope gets flatter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize.defenses.booster import Booster
from immunize.defenses.safety_sft import SafetySFT
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
TUNING = Tuning(learning_rate=0.05, steps=3, batch_size=4, optimizer=Optimizer(name="sgd", clip=None))


@dataclass
class Bowl:
    """A batch whose loss is 1/2 sum curvature (w - lowest)^2."""

    curvature: Tensor
    lowest: Tensor

    def to(self, device: Any) -> "Bowl":
        return self


class Quadratic(Context):
    """A context over two weights, and losses that are bowls."""

    def __init__(self, harmful: Bowl) -> None:
        network = nn.Module()
        network.w = nn.Parameter(torch.tensor([3.0, 4.0]))
        streams: Any = {"harmful": type("Always", (), {"batch": lambda self, number: harmful})()}
        super().__init__(ChatModel(network=network, tokenizer=None), streams=streams, seed=0, steps=1)

    def ce(self, batch: Any, *, weights: Tensor | None = None) -> Tensor:
        return (batch.curvature * (self.network.w - batch.lowest).square()).sum() / 2


def direction(context: Context, out: Any) -> dict[str, Tensor]:
    """What the engine makes of a step: the gradient of the loss plus those handed back."""
    found = context.grad(out.loss)
    return {name: grad + (out.grads or {}).get(name, 0) for name, grad in found.items()}


@pytest.mark.parametrize(("weight", "expected"), [(5.0, [5.0, 7.0]), (0.0, [2.0, 3.0])])
def test_update_on_a_quadratic_by_hand(weight: float, expected: list[float]) -> None:
    """f = |w - (1, 1)|^2 / 2 and h = |w|^2 / 2 at w = (3, 4).

    The gradient of h there is (3, 4), of norm 5; radius 1 leads to (3 - 0.6, 4 - 0.8) = (2.4, 3.2), which is the
    gradient at that point. The difference is (0.6, 0.8), five times that (3, 4); the gradient of f is (2, 3).
    """
    context = Quadratic(Bowl(torch.ones(2), torch.zeros(2)))
    out = Booster(tuning=TUNING, weight=weight, radius=1.0).step(context, Bowl(torch.ones(2), torch.ones(2)))  # type: ignore[arg-type]
    torch.testing.assert_close(direction(context, out)["w"], torch.tensor(expected))
    assert torch.equal(context.network.w, torch.tensor([3.0, 4.0]))


def test_unequal_curvature_by_hand() -> None:
    """h = (4 w1^2 + w2^2) / 2 at (3, 4), with gradient (12, 4): curvature times half of (12, 4) / sqrt(160)."""
    context = Quadratic(Bowl(torch.tensor([4.0, 1.0]), torch.zeros(2)))
    out = Booster(tuning=TUNING, weight=1.0, radius=0.5).step(context, Bowl(torch.zeros(2), torch.zeros(2)))  # type: ignore[arg-type]
    assert out.grads is not None
    torch.testing.assert_close(out.grads["w"], 0.5 * torch.tensor([48.0, 4.0]) / 160**0.5)


def test_direction_is_a_finite_difference(make_chat: MakeChat, make_context: MakeContext) -> None:
    """Of h(w) - h(w - s) with the step s held fixed, along a random direction."""
    context = make_context(make_chat())
    method = Booster(tuning=TUNING, weight=1.0, radius=0.3)
    batch = context.streams["harmful"].batch(0)
    gradient = context.grad(context.ce(batch))
    norm = sum(grad.double().square().sum().item() for grad in gradient.values()) ** 0.5
    step = {name: -0.3 / norm * grad for name, grad in gradient.items()}
    found = method.attenuation(context)
    probe = {name: context.normal_like(grad, name) for name, grad in found.items()}

    def value(scale: float) -> float:
        with context.at({name: scale * shift for name, shift in probe.items()}):
            here = context.ce(batch).item()
            with context.at(step):
                return here - context.ce(batch).item()

    slope = (value(1e-3) - value(-1e-3)) / 2e-3
    assert sum((found[name] * probe[name]).sum().item() for name in found) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [FullParameter(), LoRA(rank=2)])
def test_weights_come_back_to_the_bit(
    dtype: torch.dtype, trainable: Any, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """In half precision, too, where subtracting what was added would not do."""
    chat = make_chat()
    chat.network.to(dtype)
    prepare_trainable(chat, trainable, seed=0)
    context = make_context(chat)
    before = {name: parameter.detach().clone() for name, parameter in chat.network.named_parameters()}
    found = Booster(tuning=TUNING, radius=0.5).attenuation(context)
    assert any(grad.any() for grad in found.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in chat.network.named_parameters())


def test_both_points_meet_the_same_dropout(make_chat: MakeChat, make_context: MakeContext) -> None:
    """Otherwise the difference would be that of the masks, however short the step."""
    context = make_context(make_chat(dropout=0.3))
    context.network.train()
    found = Booster(tuning=TUNING, weight=1.0, radius=1e-6).attenuation(context)
    size = sum(grad.square().sum().item() for grad in found.values()) ** 0.5
    assert size < 1e-3


@pytest.mark.parametrize("neutral", ["weight", "radius"])
def test_neutral_settings_are_fine_tuning_to_the_bit(neutral: str, make_chat: MakeChat, roles: Roles) -> None:
    chats = []
    for method in (
        Booster(tuning=TUNING, retain_weight=2.0, **{neutral: 0.0}),
        SafetySFT(tuning=TUNING, retain_weight=2.0),
    ):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_training_makes_a_harmful_step_gain_less(make_chat: MakeChat, make_context: MakeContext, roles: Roles) -> None:
    """The attenuated quantity itself, on the harmful data, against plain fine-tuning on the same refusals."""

    def gain(weight: float) -> float:
        tuning = Tuning(learning_rate=0.05, steps=20, batch_size=10, optimizer=Optimizer(name="sgd"))
        chat = make_chat()
        tune(chat, Booster(tuning=tuning, weight=weight, radius=0.3), roles=roles, tuning=tuning, seed=0)
        context = make_context(chat, batch_size=10)
        batch = context.draw("harmful")
        here, gradient = context.ce(batch).item(), context.grad(context.ce(batch))
        norm = sum(grad.double().square().sum().item() for grad in gradient.values()) ** 0.5
        with context.at({name: -0.3 / norm * grad for name, grad in gradient.items()}):
            return here - context.ce(batch).item()

    assert 0 < gain(5.0) < 0.8 * gain(0.0)


@pytest.mark.parametrize("name", ["weight", "radius"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=-1.0: must not be negative"):
        Booster(tuning=TUNING, **{name: -1.0})
