"""Vaccine: the perturbation is the formula's, the loss under it is what is learned, and it is gone after the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.data.batches import Batch
from immunize.defenses.safety_sft import SafetySFT
from immunize.defenses.vaccine import Vaccine, with_norm
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
TUNING = Tuning(learning_rate=0.05, steps=3, batch_size=4, optimizer=Optimizer(name="sgd", clip=None))
DIRECTIONS: Any = ("gradient", "random")


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


@pytest.fixture
def batch(context: Context) -> Batch:
    return context.draw("refusals")


def perturbation(context: Context, batch: Batch, method: Vaccine) -> dict[str, Tensor]:
    return with_norm(method.directions(context, batch), method.radius)


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5


def test_perturbation_by_hand() -> None:
    """Gradients of 2 x 2 activations at two layers: squares 4 + 16 + 16 and 64 make a norm of 10, wanted is 5."""
    gradients = {"first": torch.tensor([[2.0, 0.0], [-4.0, 4.0]]), "second": torch.tensor([[0.0, 8.0], [0.0, 0.0]])}
    found = with_norm(gradients, 5.0)
    torch.testing.assert_close(found["first"], torch.tensor([[1.0, 0.0], [-2.0, 2.0]]))
    torch.testing.assert_close(found["second"], torch.tensor([[0.0, 4.0], [0.0, 0.0]]))


def test_no_direction_is_no_perturbation() -> None:
    assert torch.equal(with_norm({"only": torch.zeros(2, 2)}, 3.0)["only"], torch.zeros(2, 2))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("radius", [0.5, 4.0])
def test_norm_over_all_layers_is_the_radius(direction: Any, radius: float, context: Context, batch: Batch) -> None:
    found = perturbation(context, batch, Vaccine(tuning=TUNING, radius=radius, direction=direction))
    assert len(found) == 3
    assert norm(found) == pytest.approx(radius, rel=1e-5)
    padding = ~batch.attention_mask.bool()
    assert padding.any()
    assert all(torch.equal(shift[padding], torch.zeros_like(shift[padding])) for shift in found.values())


def test_first_order_increase_and_no_random_direction_does_better(context: Context, batch: Batch) -> None:
    """f rises by radius x |gradient|, and noise of the same norm raises it less."""
    radius, method = 0.01, Vaccine(tuning=TUNING, radius=0.01)
    steepness = norm(method.directions(context, batch))
    before = context.ce(batch).item()

    def increase(method: Vaccine) -> float:
        with context.inject(perturbation(context, batch, method)):
            return context.ce(batch).item() - before

    worst = increase(method)
    assert worst == pytest.approx(radius * steepness, rel=0.05)
    for step in range(10):
        context.step = step
        assert increase(Vaccine(tuning=TUNING, radius=radius, direction="random")) < worst / 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lora", [False, True])
def test_update_is_the_gradient_under_the_perturbation(
    direction: Any, lora: bool, make_chat: MakeChat, make_context: MakeContext, roles: Roles
) -> None:
    """One step by the engine against the same step by hand, the perturbation being a constant; benign data beside."""
    tuning = Tuning(
        learning_rate=0.05,
        steps=1,
        batch_size=4,
        optimizer=Optimizer(name="sgd", clip=None),
        trainable=LoRA(rank=2) if lora else TUNING.trainable,
    )
    method = Vaccine(tuning=tuning, radius=3.0, direction=direction, retain_weight=0.5)
    tuned, chat = make_chat(), make_chat()
    tune(tuned, method, roles=roles, tuning=tuning, seed=0)
    prepare_trainable(chat, tuning.trainable, seed=0)
    context = make_context(chat)
    batch = context.streams["refusals"].batch(0)
    with context.inject(perturbation(context, batch, method)):
        perturbed = context.grad(context.ce(batch))
    benign = context.grad(context.ce(context.streams["retain"].batch(0)))
    expected = {
        name: parameter.detach() - 0.05 * (perturbed[name] + 0.5 * benign[name])
        for name, parameter in context.params().items()
    }
    found = {name: parameter for name, parameter in tuned.network.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_both_passes_meet_the_same_dropout(make_chat: MakeChat, make_context: MakeContext) -> None:
    """So that the direction is that of the network that learns: a tiny radius leaves the loss where it was."""
    context = make_context(make_chat(dropout=0.3))
    context.network.train()
    batch = context.draw("refusals")
    torch.manual_seed(5)
    plain = context.ce(batch).item()
    torch.manual_seed(5)
    assert Vaccine(tuning=TUNING, radius=1e-6).step(context, batch).loss.item() == pytest.approx(plain, rel=1e-5)
    context.release()
    torch.manual_seed(6)
    assert context.ce(batch).item() != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_radius_zero_is_fine_tuning_on_refusals_to_the_bit(direction: Any, make_chat: MakeChat, roles: Roles) -> None:
    chats = []
    methods = (
        Vaccine(tuning=TUNING, radius=0.0, direction=direction, retain_weight=2.0),
        SafetySFT(tuning=TUNING, retain_weight=2.0),
    )
    for method in methods:
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_random_noise_follows_step_and_seed(make_chat: MakeChat, make_context: MakeContext) -> None:
    method = Vaccine(tuning=TUNING, radius=20.0, direction="random")

    def losses(seed: int) -> list[float]:
        context = make_context(make_chat(), seed=seed)
        batch, found = make_context(make_chat()).draw("refusals"), []
        for step in range(3):
            context.step = step
            found.append(method.step(context, batch).loss.item())
            context.release()
        return found

    assert len(set(losses(0))) == 3
    assert losses(0) == losses(0) != losses(1)


def test_negative_radius_is_refused() -> None:
    with pytest.raises(ValueError, match=r"radius=-1.*norm of the perturbation"):
        Vaccine(tuning=TUNING, radius=-1.0)
