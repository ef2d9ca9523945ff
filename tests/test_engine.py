"""The engine: plain tuning is a hand-written loop to the bit, and measuring, hooks and counts keep their promises."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import Stream
from immunize.models.loading import ChatModel
from immunize.seeding import derive
from immunize.training.budget import Spent
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.tune import tune
from immunize.training.tuning import LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
Roles = dict[str, Any]
STEPS = 5


def train(chat: ChatModel, method: Method, roles: Roles, *, seed: int = 0, **changes: Any) -> Spent:
    """Tune by `method`; `changes` are those of `Tuning` and of `tune`."""
    settings = {"learning_rate": 0.01, "steps": STEPS, "batch_size": 4}
    options = {name: changes.pop(name) for name in ("measure", "measured_steps", "progress") if name in changes}
    return tune(chat, method, roles=roles, tuning=Tuning(**{**settings, **changes}), seed=seed, **options)


def equal(one: ChatModel, other: ChatModel) -> bool:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def distance(one: ChatModel, other: ChatModel) -> float:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return max((first - second).abs().max().item() for first, second in pairs)


def main_stream(chat: ChatModel, roles: Roles, *, batch_size: int = 4) -> Stream:
    return Stream(name="main", examples=roles["main"], batch_size=batch_size, pad_id=chat.pad_id, seed=0)


def by_hand(chat: ChatModel, roles: Roles, *, make_optimizer: Any, factor: Callable[[int], float]) -> None:
    """Supervised fine-tuning in plain PyTorch."""
    network, stream = chat.network, main_stream(chat, roles)
    network.train()
    optimizer = make_optimizer(list(network.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for number in range(STEPS):
        torch.manual_seed(derive(0, "noise", number))
        batch: Any = stream.batch(number)
        logits = network(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        targets = batch.labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        optimizer.zero_grad()
        (total / (targets != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_tuning_is_a_plain_loop(dropout: float, make_chat: MakeChat, roles: Roles) -> None:
    """AdamW at a constant rate, to the bit."""
    tuned, expected, start = (make_chat(dropout=dropout) for _ in range(3))
    train(tuned, Method(), roles, optimizer=Optimizer(weight_decay=0.1))
    by_hand(
        expected,
        roles,
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
        factor=lambda step: 1.0,
    )
    assert equal(tuned, expected)
    assert distance(tuned, start) > 0.01


def test_warmup_and_linear_decay_are_those_of_a_plain_loop(make_chat: MakeChat, roles: Roles) -> None:
    tuned, expected = make_chat(), make_chat()
    train(tuned, Method(), roles, optimizer=Optimizer(schedule="linear", warmup=0.4))
    by_hand(
        expected,
        roles,
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.0, fused=True),
        factor=lambda step: [1 / 2, 1, 1, 1 - 1 / 3, 1 - 2 / 3, 0][step],
    )
    assert equal(tuned, expected)


def test_sgd_with_momentum_is_that_of_a_plain_loop(make_chat: MakeChat, roles: Roles) -> None:
    tuned, expected = make_chat(), make_chat()
    train(tuned, Method(), roles, optimizer=Optimizer(name="sgd", momentum=0.9))
    by_hand(
        expected,
        roles,
        make_optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
        factor=lambda step: 1.0,
    )
    assert equal(tuned, expected)


def test_same_seed_same_bits_other_seed_others(make_chat: MakeChat, roles: Roles) -> None:
    """Whatever was drawn from the global random state before."""
    one, same, other = (make_chat(dropout=0.3) for _ in range(3))
    for chat, seed, drawn in ((one, 0, 1), (same, 0, 2), (other, 1, 1)):
        torch.manual_seed(drawn)
        train(chat, Method(), roles, seed=seed)
    assert equal(one, same)
    assert not equal(one, other)


def test_no_clipping_where_there_is_none(make_chat: MakeChat, roles: Roles) -> None:
    """A single step of stochastic gradient descent moves by rate x min(norm, clip)."""
    moved = {}
    for clip in (None, 0.01):
        start, chat = make_chat(), make_chat()
        train(chat, Method(), roles, steps=1, optimizer=Optimizer(name="sgd", clip=clip))
        pairs = zip(start.network.parameters(), chat.network.parameters(), strict=True)
        moved[clip] = sum((one - other).double().square().sum().item() for one, other in pairs) ** 0.5
    assert moved[0.01] == pytest.approx(0.01 * 0.01, rel=1e-3)
    assert moved[None] > 0.01 * 1.0


def test_half_precision_model_is_tuned_in_its_own_precision(make_chat: MakeChat, roles: Roles) -> None:
    chat = make_chat()
    chat.network.bfloat16()
    start = chat.network.lm_head.weight.detach().clone()
    train(chat, Method(), roles)
    assert all(parameter.dtype is torch.bfloat16 for parameter in chat.network.parameters())
    assert not torch.equal(chat.network.lm_head.weight, start)


# Measuring


@dataclass(frozen=True, kw_only=True)
class Modes(Method):
    """Writes down the network's mode in each step."""

    log: list[str] = field(default_factory=list)

    def step(self, context: Context, batch: Any) -> StepOut:
        assert len({module.training for module in context.network.modules()}) == 1
        self.log.append(f"step {context.network.training}")
        return super().step(context, batch)


def test_network_trains_in_train_mode_and_is_measured_in_eval_mode(make_chat: MakeChat, roles: Roles) -> None:
    """Hugging Face models load in eval mode, and Lightning would leave them there."""
    chat, method = make_chat(), Modes()

    def measure(step: int, spent: Spent) -> None:
        assert len({module.training for module in chat.network.modules()}) == 1
        method.log.append(f"measured {chat.network.training}")

    train(chat, method, roles, steps=2, measure=measure, measured_steps=range(3))
    assert method.log == ["measured False", "step True", "measured False", "step True", "measured False"]
    assert not chat.network.training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_measuring_changes_no_bit(dropout: float, make_chat: MakeChat, roles: Roles) -> None:
    """Though it draws random numbers, changes the mode of a module, and looks at the model."""
    measured, expected = make_chat(dropout=dropout), make_chat(dropout=dropout)

    def measure(step: int, spent: Spent) -> None:
        torch.rand(7)
        with torch.no_grad():
            measured.network.train()
            measured.network(input_ids=torch.arange(8)[None])

    train(measured, Method(), roles, measure=measure, measured_steps=range(STEPS + 1))
    train(expected, Method(), roles)
    assert equal(measured, expected)


@pytest.mark.parametrize("asked", [(0, 2, STEPS), (), (0,), (STEPS,), (3, 1)])
def test_measured_at_the_steps_asked_for(asked: tuple[int, ...], make_chat: MakeChat, roles: Roles) -> None:
    """Each once, in order, with the weights after that many steps."""
    chat, start, seen = make_chat(), make_chat(), []

    def measure(step: int, spent: Spent) -> None:
        assert spent.steps == step and spent.examples == 4 * step
        assert equal(chat, start) is (step == 0)
        seen.append(step)

    train(chat, Method(), roles, measure=measure, measured_steps=asked)
    assert seen == sorted(asked)


def test_spent_counts_tokens_without_padding(make_chat: MakeChat, roles: Roles) -> None:
    chat = make_chat()
    stream = main_stream(chat, roles)
    spent = train(chat, Method(), roles)
    chosen = [index for number in range(STEPS) for index in stream.indices(number)]
    assert (spent.steps, spent.examples) == (STEPS, 4 * STEPS)
    assert spent.tokens == sum(len(roles["main"][index].ids) for index in chosen)
    assert spent.flops == 6 * sum(parameter.numel() for parameter in chat.network.parameters()) * spent.tokens


# The hooks and what a step hands back


@dataclass(frozen=True, kw_only=True)
class AllHooks(Method):
    """A user's method with all five hooks: writes down what it meets, and moves the weights in the end."""

    log: list[str] = field(default_factory=list)

    def setup(self, context: Context) -> None:
        context.state.norms = []
        self.log.append(f"setup {context.step}")

    def step(self, context: Context, batch: Any) -> StepOut:
        self.log.append(f"step {context.step}")
        return StepOut(loss=context.ce(batch) * 100)

    def before_update(self, context: Context) -> None:
        grads = [parameter.grad for parameter in context.params().values()]
        context.state.norms.append(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm().item())
        context.state.before = context.snapshot()
        self.log.append(f"before {context.step}")

    def after_update(self, context: Context) -> None:
        moved = [name for name, saved in context.state.before.items() if not torch.equal(saved, context.params()[name])]
        assert len(moved) == len(context.params())
        self.log.append(f"after {context.step}")

    def finish(self, context: Context) -> None:
        assert all(norm > 1.1 for norm in context.state.norms), "before clipping to 1"
        context.edit("lm_head.weight", torch.ones(()))
        self.log.append(f"finish {context.step} of {context.steps}")


def test_hooks_are_called_in_order_once_an_optimizer_step(make_chat: MakeChat, roles: Roles) -> None:
    method = AllHooks()
    train(make_chat(), method, roles, steps=2)
    steps = ["step 0", "before 0", "after 1", "step 1", "before 1", "after 2"]
    assert method.log == ["setup 0", *steps, "finish 2 of 2"]


@dataclass(frozen=True, kw_only=True)
class OnlyEnds(AllHooks):
    def finish(self, context: Context) -> None:
        self.log.append("finish")


def test_no_steps_are_setup_and_finish_alone(make_chat: MakeChat, roles: Roles) -> None:
    chat, method = make_chat(), OnlyEnds()
    spent = train(chat, method, roles, steps=0)
    assert method.log == ["setup 0", "finish"]
    assert (spent.steps, spent.tokens) == (0, 0)
    assert equal(chat, make_chat())


@dataclass(frozen=True, kw_only=True)
class ByGradients(Method):
    """Supervised fine-tuning whose gradient is handed back: `share` of it, the rest through the loss."""

    share: float = 1.0

    def step(self, context: Context, batch: Any) -> StepOut:
        grads = {name: self.share * grad for name, grad in context.grad(context.ce(batch)).items()}
        return StepOut(loss=(1 - self.share) * context.ce(batch), grads=grads)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_handed_back_count_like_those_of_the_loss(
    share: float, clip: float | None, make_chat: MakeChat, roles: Roles
) -> None:
    """Also where they are clipped: the norm is that of both together."""
    optimizer = Optimizer(name="sgd", clip=clip)
    given, expected = make_chat(), make_chat()
    train(given, ByGradients(share=share), roles, optimizer=optimizer)
    train(expected, Method(), roles, optimizer=optimizer)
    assert distance(given, expected) < 1e-6


@dataclass(frozen=True, kw_only=True)
class PartialGradients(Method):
    """Hands back a gradient for one matrix; the loss reaches none."""

    def step(self, context: Context, batch: Any) -> StepOut:
        grad = context.grad(context.ce(batch))["lm_head.weight"]
        return StepOut(loss=torch.zeros(()), grads={"lm_head.weight": grad})


def test_parameters_without_a_gradient_are_left_alone(make_chat: MakeChat, roles: Roles) -> None:
    """Weight decay included: a gradient of zero would let it act."""
    chat, start = make_chat(), make_chat()
    train(chat, PartialGradients(), roles, optimizer=Optimizer(weight_decay=0.5))
    pairs = zip(chat.network.named_parameters(), start.network.parameters(), strict=True)
    assert [name for (name, one), other in pairs if not torch.equal(one, other)] == ["lm_head.weight"]


# Micro-batches


class Doubled(Stream):
    """Each batch is one of half its size, twice."""

    def _at(self, start: int, rows: int) -> list[int]:
        half = self.batch_size // 2
        return super()._at(start // self.batch_size * half, half) * (rows // half)

    def _length(self, index: int) -> int:
        return 0


PLAIN_SGD = Optimizer(name="sgd", clip=None)  # whose updates are its gradients: AdamW would hide a wrong scale


@pytest.mark.parametrize("method", [Method(), ByGradients(), ByGradients(share=0.3)])
def test_two_equal_micro_batches_are_one(
    method: Method, make_chat: MakeChat, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled, single = make_chat(), make_chat()
    train(single, method, roles, batch_size=4, optimizer=PLAIN_SGD)
    monkeypatch.setattr("immunize.training.tune.Stream", Doubled)
    spent = train(doubled, method, roles, batch_size=8, micro_batch=4, optimizer=PLAIN_SGD)
    assert distance(doubled, single) < 1e-6
    assert distance(doubled, make_chat()) > 1e-3
    assert (spent.steps, spent.examples) == (STEPS, 8 * STEPS)


@dataclass(frozen=True, kw_only=True)
class MeanOfMeans(Method):
    """Token means of micro-batches, averaged."""

    def step(self, context: Context, batch: Any) -> StepOut:
        return StepOut(loss=context.ce(batch))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_are_the_whole_batch(rows: int, make_chat: MakeChat, roles: Roles) -> None:
    """Fine-tuning, every answer token counting alike; the mean over micro-batches of their means is something else."""
    start, whole, parts, means = (make_chat() for _ in range(4))
    options: dict[str, Any] = {"batch_size": 8, "optimizer": PLAIN_SGD}
    expected = train(whole, Method(), roles, **options)
    spent = train(parts, Method(), roles, micro_batch=rows, **options)
    train(means, MeanOfMeans(), roles, micro_batch=rows, **options)

    def off(chat: ChatModel) -> float:
        """Length of the difference to the whole batch's update, relative to it."""
        triples = list(zip(*(item.network.parameters() for item in (start, whole, chat)), strict=True))
        length = sum((two - one).double().square().sum().item() for one, two, _ in triples)
        return float((sum((two - three).double().square().sum().item() for _, two, three in triples) / length) ** 0.5)

    assert off(parts) < 1e-5
    assert off(means) > 1e-2
    assert spent == expected


def test_one_micro_batch_is_the_whole_batch_to_the_bit(make_chat: MakeChat, roles: Roles) -> None:
    one, whole = make_chat(dropout=0.3), make_chat(dropout=0.3)
    train(one, Method(), roles, micro_batch=4)
    train(whole, Method(), roles)
    assert equal(one, whole)


def test_micro_batches_have_dropout_masks_of_their_own(make_chat: MakeChat, roles: Roles) -> None:
    """And the same ones each time: a pure function of seed and number."""
    seen: list[list[float]] = []

    @dataclass(frozen=True, kw_only=True)
    class Drawing(Method):
        def step(self, context: Context, batch: Any) -> StepOut:
            seen[-1].append(torch.rand(()).item())
            return super().step(context, batch)

    for _ in range(2):
        seen.append([])
        train(make_chat(), Drawing(), roles, micro_batch=2)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2 * STEPS


def test_hooks_and_measurements_come_once_for_several_micro_batches(make_chat: MakeChat, roles: Roles) -> None:
    method = AllHooks()

    def measure(step: int, spent: Spent) -> None:
        assert (spent.steps, spent.examples) == (step, 4 * step)
        method.log.append(f"measured {step}")

    def progress(step: int) -> None:
        method.log.append(f"progress {step}")

    options = {"measure": measure, "measured_steps": range(3), "progress": progress}
    train(make_chat(), method, roles, steps=2, micro_batch=2, **options)
    first = ["step 0", "step 0", "before 0", "after 1", "progress 1", "measured 1"]
    second = ["step 1", "step 1", "before 1", "after 2", "progress 2", "measured 2"]
    assert method.log == ["setup 0", "measured 0", *first, *second, "finish 2 of 2"]


def test_auxiliary_roles_come_in_micro_batches_too(make_chat: MakeChat, roles: Roles) -> None:
    """Two after one another are what a whole batch would be."""
    seen: dict[int, list[list[int]]] = {}

    @dataclass(frozen=True, kw_only=True)
    class Drawing(Method):
        needs = ("main", "retain")

        def step(self, context: Context, batch: Any) -> StepOut:
            drawn = context.draw("retain")
            assert len(drawn.input_ids) == len(batch.input_ids)
            rows = zip(drawn.input_ids, drawn.attention_mask, strict=True)
            seen.setdefault(len(drawn.input_ids), []).extend(ids[: int(mask.sum())].tolist() for ids, mask in rows)
            return super().step(context, batch)

    for rows in (4, 2):
        train(make_chat(), Drawing(), roles, micro_batch=rows)
    assert len(seen[2]) == len(seen[4]) == 4 * STEPS
    for start in range(0, 4 * STEPS, 4):
        batch, halves = (rows[start : start + 4] for rows in (seen[4], seen[2]))
        assert sorted(batch) == sorted(halves)


# What goes wrong


def test_processes_that_cannot_share_a_batch_evenly_are_refused(make_chat: MakeChat, roles: Roles) -> None:
    for batch_size, micro_batch, processes in ((4, None, 3), (8, 4, 4), (4, 4, 2)):
        tuning = Tuning(learning_rate=0.1, steps=1, batch_size=batch_size, micro_batch=micro_batch)
        with pytest.raises(ValueError, match=f"{processes} processes must have equally many micro-batches"):
            tune(make_chat(), Method(), roles=roles, tuning=tuning, seed=0, world_size=processes)


@dataclass(frozen=True, kw_only=True)
class Diverging(Method):
    def step(self, context: Context, batch: Any) -> StepOut:
        return StepOut(loss=context.ce(batch) * (float("nan") if context.step == 2 else 1.0))


def test_loss_that_is_no_number_stops_the_tuning(make_chat: MakeChat, roles: Roles) -> None:
    with pytest.raises(FloatingPointError, match=f"became nan at step 3 of {STEPS} .learning rate 0.01."):
        train(make_chat(), Diverging(), roles)


@dataclass(frozen=True, kw_only=True)
class Needy(Method):
    needs = ("main", "paired", "retain")


def test_missing_data_roles_are_named_before_anything_is_done(make_chat: MakeChat, roles: Roles) -> None:
    chat = make_chat()
    with pytest.raises(ValueError, match="Needy needs the data roles paired, retain"):
        train(chat, Needy(), {"main": roles["main"]}, trainable=LoRA())
    assert not hasattr(chat.network, "peft_config")
    with pytest.raises(ValueError, match="'main' is empty"):
        train(chat, Method(), {"main": []})


def test_method_meets_the_batches_of_the_stream(make_chat: MakeChat, roles: Roles) -> None:
    """In its order, one a step."""
    chat, seen = make_chat(), []

    @dataclass(frozen=True, kw_only=True)
    class Watching(Method):
        def step(self, context: Context, batch: Any) -> StepOut:
            seen.append(batch.input_ids)
            return super().step(context, batch)

    train(chat, Watching(), roles)
    stream = main_stream(chat, roles)
    expected: list[Tensor] = [stream.batch(number).input_ids for number in range(STEPS)]  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert not any(one.shape == other.shape and torch.equal(one, other) for one, other in pairwise(seen))
