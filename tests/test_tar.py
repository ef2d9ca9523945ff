"""TAR: the outer gradient is the formula's on a quadratic, and the attacker inside leaves no trace of itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize.data.batches import IGNORED, PairedBatch
from immunize.defenses.tar import TAR
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.losses import hidden_distance
from immunize.training.method import Method, StepOut
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
TUNING = Tuning(learning_rate=0.05, steps=3, batch_size=4, optimizer=Optimizer(name="sgd", clip=None))


def tar(**changes: Any) -> TAR:
    settings = {"tuning": TUNING, "objective": "entropy", "inner_steps": 4, "every": 2, "inner_rates": (1e-2,)}
    return TAR(**{**settings, **changes})


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


@pytest.fixture
def pair(context: Context) -> PairedBatch:
    return context.draw("paired")


# The outer gradient


class Quadratic(Context):
    """Two weights; the loss of harmful answers is |w|^2 / 2."""

    def __init__(self) -> None:
        network = nn.Module()
        network.w = nn.Parameter(torch.tensor([3.0, 4.0]))
        batch = type("Pair", (), {"harmful": None, "to": lambda self, device: self})()
        streams: Any = {"paired": type("Always", (), {"batch": lambda self, number: batch})()}
        super().__init__(ChatModel(network=network, tokenizer=None), streams=streams, seed=0, steps=1)

    def ce(self, batch: Any, *, weights: Tensor | None = None) -> Tensor:
        return self.network.w.square().sum() / 2


@dataclass(frozen=True, kw_only=True)
class OnQuadratic(TAR):
    """Whose t(w) is |w - (1, 1)|^2 / 2."""

    def tampered(self, context: Context, batch: Any, margin: Any) -> Tensor:
        return (context.network.w - 1).square().sum() / 2


def on_quadratic(**changes: Any) -> OnQuadratic:
    return OnQuadratic(**{"tuning": TUNING, "objective": "entropy", "every": 1, "inner_rates": (0.5,), **changes})


def test_one_inner_step_by_hand() -> None:
    """Adam's first step moves each weight by the rate: (3, 4) to (2.5, 3.5), where t has the gradient (1.5, 2.5)."""
    context = Quadratic()
    found = on_quadratic(inner_steps=1, resistance_weight=4.0).resistance(context, None)  # type: ignore[arg-type]
    torch.testing.assert_close(found["w"], torch.tensor([6.0, 10.0]))
    assert torch.equal(context.network.w, torch.tensor([3.0, 4.0]))


def test_two_inner_steps_by_hand() -> None:
    """Adam's second step, with betas 0.9 and 0.999, on the gradients 3 then 2.5, and 4 then 3.5.

    First weight: (0.09 x 3 + 0.1 x 2.5) / 0.19 = 2.73684 over the root of (0.000999 x 9 + 0.001 x 6.25) / 0.001999 =
    7.62431, which is 2.76121: 0.99117, half of it from 2.5 is 2.00442. Second: 3.73684 / sqrt(14.12406) = 0.99432, and
    half of it from 3.5 is 3.00284. With late = log 2 the gradients of t count half at the first point and whole at the
    second: (0.75 + 1.00442, 1.25 + 2.00284).
    """
    found = on_quadratic(inner_steps=2, resistance_weight=1.0, late=math.log(2)).resistance(Quadratic(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(found["w"], torch.tensor([1.75442, 3.25284]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", ["entropy", "preference"])
def test_attacker_that_stands_still_gives_the_gradient_here(
    objective: Any, context: Context, pair: PairedBatch
) -> None:
    method = tar(objective=objective, inner_rates=(0.0,), inner_steps=1, every=1, resistance_weight=3.0)
    found = method.resistance(context, pair)
    margin = method.preferred(context.predict_before, pair) if objective == "preference" else None
    for name, grad in context.grad(method.tampered(context, pair, margin)).items():
        torch.testing.assert_close(found[name], 3 * grad)


def test_every_counts_the_steps_at_which_t_is_looked_at(context: Context, pair: PairedBatch) -> None:
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(TAR):
        def tampered(self, context: Context, batch: PairedBatch, margin: Tensor | None) -> Tensor:
            assert batch is pair
            seen.append(context._drawn["paired"])
            return super().tampered(context, batch, margin)

    start = context._drawn["paired"]
    Watched(tuning=TUNING, objective="entropy", inner_steps=7, every=3, inner_rates=(1e-3,)).resistance(context, pair)
    assert [number - start for number in seen] == [3, 6]
    assert context._drawn["paired"] - start == 7, "a batch of its own for each step of the attacker"


def test_attackers_differ_from_step_to_step_and_follow_the_seed(
    pair: PairedBatch, make_chat: MakeChat, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, rates = torch.optim.AdamW, []

    def recording(*arguments: Any, lr: float, **options: Any) -> Any:
        rates.append(lr)
        return original(*arguments, lr=lr, **options)

    monkeypatch.setattr(torch.optim, "AdamW", recording)
    chat, method = make_chat(), tar(inner_rates=(1e-4, 1e-3), inner_steps=1, every=1)
    for seed in (0, 0, 1):
        context = make_context(chat, seed=seed)
        for context.step in range(8):
            method.resistance(context, pair)
    assert set(rates[:8]) == {1e-4, 1e-3}
    assert rates[:8] == rates[8:16] != rates[16:]


# What t and d are


def test_entropy_counts_answer_tokens_alone(context: Context, pair: PairedBatch) -> None:
    """At uniform predictions it is the most there is, log of the vocabulary."""
    method = tar()
    with torch.no_grad():
        logits = context.network(input_ids=pair.harmful.input_ids).logits.double()
    entropies = []
    for row, column in (pair.harmful.labels != IGNORED).nonzero().tolist():
        log_p = logits[row, column - 1].log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum().item())
    found = method.tampered(context, pair, None).item()
    assert found == pytest.approx(-sum(entropies) / len(entropies), rel=1e-5)
    with torch.no_grad():
        context.network.lm_head.weight.zero_()
    assert method.tampered(context, pair, None).item() == pytest.approx(-math.log(320), rel=1e-6)


def test_preference_by_hand(context: Context, pair: PairedBatch) -> None:
    """log 2 where nothing has moved; with a margin of 2 nats lost and beta 0.5, log(1 + e^1)."""
    method = tar(objective="preference", preference_beta=0.5)
    margin = method.preferred(context.predict, pair).detach()
    assert method.tampered(context, pair, margin).item() == pytest.approx(math.log(2), rel=1e-5)
    assert method.tampered(context, pair, margin + 2).item() == pytest.approx(math.log(1 + math.e), rel=1e-5)
    with torch.no_grad():
        logits = {id(side): context.network(input_ids=side.input_ids).logits for side in (pair.refusal, pair.harmful)}
    by_hand = [0.0] * 4
    for side, sign in ((pair.refusal, 1), (pair.harmful, -1)):
        for row, column in (side.labels != IGNORED).nonzero().tolist():
            token = side.labels[row, column]
            by_hand[row] += sign * logits[id(side)][row, column - 1].log_softmax(-1)[token].item()
    assert margin.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_hidden_distance_by_hand() -> None:
    """Lengths 5 and 0 at the first depth, 13 and 1 at the second; the third token is padding."""
    first = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [9.0, 9.0]]])
    second = torch.tensor([[[5.0, 12.0], [0.0, 1.0], [9.0, 9.0]]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    reference = [torch.zeros(1, 3, 2)] * 2
    distance = hidden_distance([first, second], reference, mask)
    assert distance.item() == pytest.approx((2.5 + 7) / 2)
    still = torch.zeros(1, 3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(hidden_distance([still], [reference[0]], mask), still)
    assert torch.equal(gradient, torch.zeros(1, 3, 2)), "and not NaN"


# What surrounds it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [FullParameter(), LoRA(rank=2)])
def test_weights_come_back_to_the_bit(
    dtype: torch.dtype, trainable: Any, pair: PairedBatch, make_chat: MakeChat, make_context: MakeContext
) -> None:
    chat = make_chat()
    chat.network.to(dtype)
    prepare_trainable(chat, trainable, seed=0)
    context = make_context(chat)
    before = {name: parameter.detach().clone() for name, parameter in chat.network.named_parameters()}
    moved: list[bool] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(TAR):
        def tampered(self, context: Context, batch: PairedBatch, margin: Tensor | None) -> Tensor:
            moved.append(any(not torch.equal(p, before[name]) for name, p in context.params().items()))
            return super().tampered(context, batch, margin)

    Watched(tuning=TUNING, objective="entropy", inner_steps=2, every=1, inner_rates=(0.05,)).resistance(context, pair)
    assert moved == [True, True]
    for name, parameter in chat.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@dataclass(frozen=True, kw_only=True)
class OnRetain(Method):
    needs = ("paired", "retain")

    def step(self, context: Context, batch: Any) -> StepOut:
        return StepOut(loss=context.ce(context.draw("retain")))


def test_without_weights_it_is_fine_tuning_on_benign_data_to_the_bit(make_chat: MakeChat, roles: Roles) -> None:
    chats = []
    for method in (tar(resistance_weight=0.0, representation_weight=0.0), OnRetain()):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_attacker_steps_are_no_steps_of_the_tuning(make_chat: MakeChat, roles: Roles) -> None:
    """Neither in the count, nor in the schedule, nor in the state of the optimizer."""

    @dataclass(frozen=True, kw_only=True)
    class Standing(TAR):
        log: list[int] = field(default_factory=list)

        def resistance(self, context: Context, held_out: PairedBatch) -> dict[str, Tensor]:
            super().resistance(context, held_out)
            self.log.append(context.step)
            return {}

    tuning = Tuning(learning_rate=0.01, steps=4, batch_size=4, optimizer=Optimizer(schedule="linear"))
    settings: Any = {"tuning": tuning, "objective": "entropy", "inner_steps": 3, "inner_rates": (0.05,), "every": 1}
    method = Standing(**settings, representation_weight=0.0)
    chats = []
    for one in (method, OnRetain()):
        chats.append(make_chat())
        assert tune(chats[-1], one, roles=roles, tuning=tuning, seed=0).steps == 4
    assert method.log == [0, 1, 2, 3]
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_entropy_lasts_longer_under_attack(make_chat: MakeChat, roles: Roles, make_context: MakeContext) -> None:
    """What it trains for: after the attacker's steps, the answers are less certain than without it."""

    def after_attack(weight: float) -> float:
        tuning = Tuning(learning_rate=0.003, steps=30, batch_size=10, optimizer=Optimizer())
        chat = make_chat()
        tune(
            chat,
            tar(tuning=tuning, resistance_weight=weight, inner_rates=(0.003,)),
            roles=roles,
            tuning=tuning,
            seed=0,
        )
        attack = Tuning(learning_rate=0.003, steps=4, batch_size=10, optimizer=Optimizer())
        tune(chat, Method(), roles={"main": roles["harmful"]}, tuning=attack, seed=1)
        context = make_context(chat, batch_size=10)
        return -tar().tampered(context, context.draw("paired"), None).item()

    assert after_attack(4.0) > after_attack(0.0) + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resistance_weight": -1.0}, r"resistance_weight=-1.0: must not be negative"),
        ({"retain_weight": 0.0}, r"retain_weight=0.0: must be positive"),
        ({"preference_beta": 0.0}, r"preference_beta=0.0: must be positive"),
        ({"every": 5}, r"every=5: must lie between 1 and inner_steps=4"),
        ({"inner_rates": ()}, r"inner_rates=\[\]"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tar(**changes)
