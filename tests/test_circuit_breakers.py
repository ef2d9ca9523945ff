"""Circuit breakers: both terms by hand, nothing to follow at the start but the noise, and where the adapters sit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.data.batches import IGNORED, Batch
from immunize.defenses.circuit_breakers import CircuitBreakers
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
PART = LoRA(rank=4, alpha=8.0, targets=r"model\.layers\.[0-1]\..*_proj")
TUNING = Tuning(learning_rate=0.01, steps=8, batch_size=4, optimizer=Optimizer(), trainable=PART)
BOTH = pytest.mark.parametrize("trainable", [FullParameter(), LoRA(rank=2, alpha=8.0)], ids=["full", "lora"])


def breakers(**changes: Any) -> CircuitBreakers:
    return CircuitBreakers(**{"tuning": TUNING, "layers": (0, 1), **changes})


def started(make_chat: MakeChat, make_context: MakeContext, method: CircuitBreakers, trainable: Any) -> Context:
    chat = make_chat()
    prepare_trainable(chat, trainable, seed=0)
    context = make_context(chat, steps=TUNING.steps)
    method.setup(context)
    return context


def norm(gradients: dict[str, Tensor]) -> float:
    return sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5


class Fixed(Context):
    """A context whose network has two layers and three tokens, the third being padding, with these hidden states."""

    def __init__(self, now: list[Tensor], before: list[Tensor]) -> None:
        self.now, self.before, self.step, self.steps = now, before, 0, 10

    def hidden_states(self, batch: Any) -> Any:
        return self.now

    def hidden_states_before(self, batch: Any) -> Any:
        return self.before


def test_both_terms_by_hand() -> None:
    """Depth 0: (3, 4) against (4, 3) has cosine 24 / 25, (1, 0) against (-1, 1) a negative one, which counts as zero.

    Depth 1: equal, and at right angles. The mean over four is (0.96 + 0 + 1 + 0) / 4 = 0.49. The distances are
    sqrt(2), sqrt(5), 0 and 5, whose mean is (1.41421 + 2.23607 + 0 + 5) / 4 = 2.16257.
    """
    embedding, padding = torch.full((1, 3, 2), 7.0), [9.0, 9.0]
    now = [
        embedding,
        torch.tensor([[[3.0, 4.0], [1.0, 0.0], padding]]),
        torch.tensor([[[2.0, 2.0], [3.0, 0.0], padding]]),
    ]
    before = [
        -embedding,
        torch.tensor([[[4.0, 3.0], [-1.0, 1.0], [0.0, 1.0]]]),
        torch.tensor([[[2.0, 2.0], [0.0, 4.0], [0.0, 1.0]]]),
    ]
    mask = torch.tensor([[1, 1, 0]])
    batch = Batch(input_ids=mask, labels=torch.full_like(mask, IGNORED), attention_mask=mask)
    context = Fixed(now, before)
    assert breakers().rerouted(context, batch).item() == pytest.approx(0.49)
    assert breakers(layers=(0,)).rerouted(context, batch).item() == pytest.approx(0.48)
    assert breakers().retained(context, batch).item() == pytest.approx(2.16257, rel=1e-5)


@pytest.mark.parametrize(("step", "reroute", "retain"), [(0, 10.0, 0.0), (4, 7.5, 2.5), (8, 5.0, 5.0)])
def test_coefficients_move_from_one_term_to_the_other(
    step: int, reroute: float, retain: float, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """(alpha, 0) at the start, (alpha / 2, alpha / 2) at the end, whatever the number of steps."""
    method = breakers(start_noise=0.02)
    context = started(make_chat, make_context, method, PART)
    batch: Any = context.streams["harmful"].batch(0)
    benign: Any = context.streams["retain"].batch(0)
    context.step = step
    expected = reroute * method.rerouted(context, batch) + retain * method.retained(context, benign)
    assert method.step(context, batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@BOTH
def test_nothing_to_follow_at_the_start_without_noise(
    trainable: Any, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """The cosine is 1 and its gradient rounding; a little noise gives it a direction."""
    sizes = {}
    for noise in (0.0, 0.001):
        method = breakers(start_noise=noise)
        context = started(make_chat, make_context, method, trainable)
        batch: Any = context.streams["harmful"].batch(0)
        rerouted, retained = method.rerouted(context, batch), method.retained(context, batch)
        assert rerouted.item() == pytest.approx(1.0, abs=1e-3)
        if not noise:
            assert retained.item() == 0
            assert norm(context.grad(retained)) == 0
        sizes[noise] = norm(context.grad(rerouted))
    assert sizes[0.0] < 1e-5
    assert sizes[0.001] > 100 * sizes[0.0]


@BOTH
def test_start_noise_follows_the_seed(trainable: Any, make_chat: MakeChat, make_context: MakeContext) -> None:
    weights = {}
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        chat = make_chat()
        prepare_trainable(chat, trainable, seed=0)
        untouched = {key: tensor.detach().clone() for key, tensor in chat.network.named_parameters()}
        torch.rand(3)
        context = make_context(chat, seed=seed)
        breakers(start_noise=0.02).setup(context)
        moved = torch.cat([(tensor - untouched[key]).detach().flatten() for key, tensor in context.params().items()])
        assert moved.std().item() == pytest.approx(0.02, rel=0.1)
        frozen = {key for key, tensor in chat.network.named_parameters() if not tensor.requires_grad}
        assert all(torch.equal(chat.network.get_parameter(key), untouched[key]) for key in frozen)
        weights[name] = moved
    assert torch.equal(weights["first"], weights["same"])
    assert not torch.equal(weights["first"], weights["other"])


@BOTH
def test_alpha_zero_trains_nothing(trainable: Any, make_chat: MakeChat, roles: Roles) -> None:
    chat, start = make_chat(), make_chat()
    tuning = replace(TUNING, trainable=trainable)
    prepare_trainable(start, trainable, seed=0)
    tune(chat, breakers(tuning=tuning, alpha=0.0, start_noise=0.0), roles=roles, tuning=tuning, seed=0)
    pairs = zip(chat.network.parameters(), start.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_adapters_on_part_of_the_layers_reroute(make_chat: MakeChat, roles: Roles) -> None:
    """The layer beyond the last rerouted one has none; harmful representations turn away, benign ones less."""
    seen: dict[str, float] = {}

    class Watched(CircuitBreakers):
        def finish(self, context: Context) -> None:
            with torch.no_grad():
                for role in ("harmful", "retain"):
                    seen[role] = self.rerouted(context, context.draw(role)).item()

    chat, tuning = make_chat(), replace(TUNING, steps=40)
    tune(chat, Watched(tuning=tuning, layers=(0, 1)), roles=roles, tuning=tuning, seed=0)
    trained = {name for name, parameter in chat.network.named_parameters() if parameter.requires_grad}
    assert {name.split("layers.")[1][0] for name in trained} == {"0", "1"}
    assert seen["harmful"] < 0.5 < seen["retain"]


@BOTH
def test_reference_keeps_its_bits(trainable: Any, make_chat: MakeChat, roles: Roles) -> None:
    """Whether it is a copy or the network with its adapter off."""
    outputs: list[Tensor] = []

    class Watched(CircuitBreakers):
        def before_update(self, context: Context) -> None:
            batch: Any = context.streams["harmful"].batch(0)
            outputs.append(context.predict_before(batch).logits)

    tuning = replace(TUNING, trainable=trainable)
    tune(make_chat(), Watched(tuning=tuning, layers=(0, 1)), roles=roles, tuning=tuning, seed=0)
    assert len(outputs) == 8
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1.0}, r"alpha=-1.0: must not be negative"),
        ({"start_noise": -1.0}, r"start_noise=-1.0: must not be negative"),
        ({"layers": ()}, r"layers=\[\]: must be one depth or more"),
        ({"layers": (1, 1)}, r"layers=\[1, 1\].*each once"),
        ({"layers": (-1,)}, r"layers=\[-1\].*counted from 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        breakers(**changes)


def test_depth_that_the_model_has_not_is_named(make_chat: MakeChat, roles: Roles) -> None:
    with pytest.raises(ValueError, match=r"layers=\[0, 3\]: this model has 3, counted from 0"):
        tune(make_chat(), breakers(layers=(0, 3)), roles=roles, tuning=TUNING, seed=0)
