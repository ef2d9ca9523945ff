"""The primitives of every method: what they compute, and that they leave nothing behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.models import adapters
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Trainable, Tuning

LORA = LoRA(rank=2, alpha=8.0)
ARCHITECTURES = ("llama", "gpt_neox")
MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]


def hooks(network: Any) -> int:
    """Ours, that is: transformers leaves its own to collect hidden states."""
    found = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    return sum(hook.__module__.startswith("immunize") for hook in found)


def bits(chat: ChatModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in chat.network.named_parameters()}


def same_bits(chat: ChatModel, saved: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, saved[name]) for name, parameter in chat.network.named_parameters())


def train(chat: ChatModel, method: Method, roles: dict[str, Any], **changes: Any) -> None:
    settings = {"learning_rate": 0.05, "steps": 3, "batch_size": 4, **changes}
    adapter = settings.pop("adapter", None)
    tune(chat, method, roles=roles, tuning=Tuning(**settings), seed=0, adapter=adapter)


def random_deltas(context: Context) -> dict[str, Tensor]:
    return {name: context.normal_like(parameter, name) for name, parameter in context.params().items()}


# Gradients and weights


def test_grad_is_the_gradient_and_leaves_grad_untouched(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat())
    batch = context.draw("main")
    found = context.grad(context.ce(batch))
    assert all(parameter.grad is None for parameter in context.network.parameters())
    context.ce(batch).backward()
    assert found.keys() == context.params().keys()
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in context.params().items())


def test_grad_leaves_out_what_the_loss_does_not_reach(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat())
    found = context.grad(context.forward(context.draw("main"), hidden_states=True).hidden_states[1].sum())
    assert "lm_head.weight" not in found
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert not any("layers.1" in name for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_shifts_and_restores_the_bits(dtype: torch.dtype, make_chat: MakeChat, make_context: MakeContext) -> None:
    """Also in bfloat16, where subtracting what was added would not, and when something fails inside."""
    chat = make_chat()
    chat.network.to(dtype)
    context, saved = make_context(chat), bits(chat)
    deltas = random_deltas(context)
    with context.at(deltas):
        for name, parameter in context.params().items():
            assert torch.equal(parameter, saved[name] + deltas[name])
    assert same_bits(chat, saved)
    with pytest.raises(RuntimeError, match="inside"), context.at(deltas):
        raise RuntimeError("inside")
    assert same_bits(chat, saved)


def test_snapshot_is_a_copy_that_restores(make_chat: MakeChat, make_context: MakeContext) -> None:
    chat = make_chat()
    context, saved = make_context(chat), bits(chat)
    snapshot = context.snapshot()
    with torch.no_grad():
        for parameter in context.params().values():
            parameter.add_(1)
    assert not same_bits(chat, saved)
    context.restore(snapshot)
    assert same_bits(chat, saved)


def test_params_are_the_trainable_ones(make_chat: MakeChat, make_context: MakeContext) -> None:
    chat = make_chat()
    prepare_trainable(chat, LORA, seed=0)
    params = make_context(chat).params()
    assert params and all("lora_" in name for name in params)
    assert len(params) == 3 * 7 * 2, "two factors for each of seven matrices a layer"


@pytest.mark.parametrize("held", [True, False])
def test_update_is_a_step_of_an_optimizer_that_leaves_grad(
    held: bool, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """What was accumulated before is there afterwards, and parameters without a gradient stay."""
    chat, expected = make_chat(), make_chat()
    context = make_context(chat)
    batch = context.draw("main")
    if held:
        context.ce(batch).backward()
    accumulated = {name: parameter.grad for name, parameter in context.params().items()}
    grads = context.grad(3 * context.ce(batch))
    left_out = grads.pop("lm_head.weight")
    context.update(torch.optim.AdamW(context.params().values(), lr=0.1, weight_decay=0.5), grads)
    for name, parameter in context.params().items():
        assert parameter.grad is accumulated[name]
    for name, parameter in expected.network.named_parameters():
        parameter.grad = grads.get(name)
    torch.optim.AdamW(expected.network.parameters(), lr=0.1, weight_decay=0.5).step()
    assert same_bits(chat, bits(expected))
    assert left_out.any() and torch.equal(chat.network.lm_head.weight, make_chat().network.lm_head.weight)


# Data and randomness


def test_draw_is_the_stream_from_its_start_for_each_role(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat())
    for number in range(4):
        for role in ("retain", "harmful"):
            assert torch.equal(context.draw(role).input_ids, context.streams[role].batch(number).input_ids)


def test_rows_are_drawn_on_from_where_the_last_ended(make_chat: MakeChat, make_context: MakeContext) -> None:
    """A trial of draws leaves no trace."""
    context = make_context(make_chat())
    stream = context.streams["refusals"]
    taken = [stream.examples[index].ids for number in range(3) for index in stream.indices(number)]
    start = 0
    for count in (1, 3, 6):
        with context.trial():
            context.draw_rows("refusals", 2)
        batch = context.draw_rows("refusals", count)
        rows = zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), strict=True)
        assert [tuple(ids[:length]) for ids, length in rows] == taken[start : start + count]
        start += count


def test_noise_depends_on_seed_step_and_name_alone(make_chat: MakeChat, make_context: MakeContext) -> None:
    chat = make_chat()
    context, zeros = make_context(chat), torch.zeros(50, 40)
    first = context.normal_like(zeros, "a")
    torch.manual_seed(123)
    assert torch.equal(make_context(chat).normal_like(zeros, "a"), first)
    assert abs(first.mean().item()) < 0.1 and abs(first.std().item() - 1) < 0.1
    others = [context.normal_like(zeros, "b"), make_context(chat, seed=1).normal_like(zeros, "a")]
    context.step = 1
    others.append(context.normal_like(zeros, "a"))
    assert not any(torch.equal(other, first) for other in others)


def test_same_rng_gives_the_next_pass_the_same_dropout(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat(dropout=0.3))
    context.network.train()
    batch = context.draw("main")
    with context.same_rng():
        first = context.forward(batch).logits
    second, third = context.forward(batch).logits, context.forward(batch).logits
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


# Activations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_see_each_layer_and_leave_no_hook(
    architecture: str, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """The residual stream is that of transformers; the sites are where the sum of a layer says they are."""
    context = make_context(make_chat(architecture=architecture))
    batch = context.draw("main")
    seen: dict[str, list[Tensor]] = {}
    for kind in ("attention", "mlp", "residual"):
        with context.taps(kind) as taps:
            states = context.forward(batch, hidden_states=True).hidden_states
        seen[kind] = list(taps.values())
        assert [tuple(hidden.shape) for hidden in seen[kind]] == [(*batch.input_ids.shape, 32)] * 3
    assert hooks(context.network) == 0
    for index in range(3):
        total = states[index] + seen["attention"][index] + seen["mlp"][index]
        torch.testing.assert_close(seen["residual"][index], total)
    assert all(torch.equal(seen["residual"][index], states[index + 1]) for index in range(2))


def test_taps_leave_no_hook_when_something_fails(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat())
    with pytest.raises(RuntimeError), context.taps("mlp"), context.inject({"model.layers.0": torch.zeros(1)}):
        raise RuntimeError
    assert hooks(context.network) == 0


@pytest.mark.parametrize("trainable", [FullParameter(), LORA], ids=["full", "lora"])
def test_taps_of_the_reference_see_what_was_before(
    trainable: Trainable, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """Whether that is a copy or the network without its adapter; the names are those of the network."""
    chat = make_chat(dropout=0.3)
    prepare_trainable(chat, trainable, seed=0)
    context = make_context(chat)
    batch = context.draw("main")
    with context.taps("mlp") as expected:
        context.forward(batch)
    context.network.train()
    context.keep_reference()
    with torch.no_grad():
        for parameter in context.params().values():
            parameter.add_(0.1)
    with context.taps("mlp", reference=True) as before:
        context.predict_before(batch)
    with context.evaluating(), context.taps("mlp") as now:
        context.forward(batch)
    assert context.network.training and before.keys() == expected.keys()
    assert all(torch.equal(before[name], hidden) for name, hidden in expected.items())
    assert not any(torch.equal(now[name], hidden) or now[name].requires_grad for name, hidden in expected.items())
    assert hooks(context.network) == 0


@pytest.mark.parametrize("kind", ["attention", "mlp", "residual"])
def test_inject_adds_to_the_site(kind: Any, make_chat: MakeChat, make_context: MakeContext) -> None:
    """Zero shifts change no bit; a shift of the last layer arrives in the residual stream before the last norm."""
    context = make_context(make_chat())
    batch = context.draw("main")
    with context.taps("residual") as residual, context.taps("mlp") as mlp:
        plain = context.forward(batch).logits
        assert hooks(context.network) == 6
    last = list(residual.values())[-1]
    zeros = {name: torch.zeros(1) for name in context.sites(kind)}
    with context.inject(zeros):
        assert torch.equal(context.forward(batch).logits, plain)
    shift = context.normal_like(last, "shift")
    with context.inject({list(zeros)[-1]: shift}):
        shifted = context.forward(batch).logits
    arrived = last + shift
    if kind == "attention":  # the MLP behind it sees the shift, too
        layer, between = context.network.model.layers[-1], arrived - list(mlp.values())[-1]
        arrived = between + layer.mlp(layer.post_attention_layernorm(between))
    torch.testing.assert_close(
        shifted, context.network.lm_head(context.network.model.norm(arrived)), rtol=1e-4, atol=1e-4
    )
    assert hooks(context.network) == 0


def activation_gradients(context: Context, kind: Any, batch: Any) -> list[Tensor]:
    """By differentiating captured activations of a network without frozen layers."""
    with context.taps(kind) as taps:
        loss = context.ce(batch)
    return list(torch.autograd.grad(loss, list(taps.values())))


@pytest.mark.parametrize("kind", ["attention", "mlp", "residual"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eps_grad_is_the_gradient_of_the_activations(
    kind: Any, architecture: str, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """Whether all is trained, early layers are frozen, all is frozen but an adapter, or layers are run twice."""
    context = make_context(make_chat(architecture=architecture))
    batch = context.draw("main")
    expected = activation_gradients(context, kind, batch)

    def assert_equal(found: dict[str, Tensor]) -> None:
        for one, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(one, other)

    assert_equal(context.eps_grad(kind, lambda: context.ce(batch)))
    names = list(context.network.state_dict())
    for name in names[: len(names) // 2]:
        context.network.get_parameter(name).requires_grad_(False)
    assert_equal(context.eps_grad(kind, lambda: context.ce(batch)))
    prepare_trainable(context.chat, LORA, seed=0)
    assert_equal(context.eps_grad(kind, lambda: context.ce(batch)))
    assert_equal(context.eps_grad(kind, lambda: (context.ce(batch) + context.ce(batch)) / 2))  # both passes count
    assert all(parameter.grad is None for parameter in context.network.parameters())
    assert hooks(context.network) == 0


def test_eps_grad_with_activation_checkpointing(make_chat: MakeChat, make_context: MakeContext) -> None:
    context = make_context(make_chat())
    batch = context.draw("main")
    expected = activation_gradients(context, "residual", batch)
    context.network.activation_checkpointing_enable()
    context.network.train()
    found = context.eps_grad("residual", lambda: context.ce(batch))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_eps_grad_agrees_with_finite_differences(make_chat: MakeChat, make_context: MakeContext) -> None:
    """Along a random direction at all layers at once: an independent check of `inject`, too."""
    context = make_context(make_chat())
    batch = context.draw("main")
    grads = context.eps_grad("residual", lambda: context.ce(batch))
    direction = {name: context.normal_like(grad, name) for name, grad in grads.items()}
    step, losses = 1e-2, []
    for sign in (1, -1):
        with context.inject({name: sign * step * shift for name, shift in direction.items()}):
            losses.append(context.ce(batch).item())
    slope = sum((grads[name] * direction[name]).sum().item() for name in grads)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


# What is kept until after the backward pass


@contextmanager
def recording(log: list[str]) -> Iterator[None]:
    log.append("enter")
    try:
        yield
    finally:
        log.append("leave")


@dataclass(frozen=True, kw_only=True)
class Keeper(Method):
    """Keeps a recording context open; fails in the second step if told so."""

    log: list[str] = field(default_factory=list)
    fails: bool = False

    def step(self, context: Context, batch: Any) -> StepOut:
        context.keep(recording(self.log))
        if self.fails and context.step == 1:
            raise RuntimeError("as told")
        loss = context.ce(batch)
        loss.register_hook(lambda grad: self.log.append("backward"))
        return StepOut(loss=loss)

    def before_update(self, context: Context) -> None:
        self.log.append("before update")


def test_keep_closes_after_the_backward_pass(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    method = Keeper()
    train(make_chat(), method, roles, steps=2)
    assert method.log == ["enter", "backward", "leave", "before update"] * 2


def test_keep_closes_when_a_step_fails(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    method = Keeper(fails=True)
    with pytest.raises(RuntimeError, match="as told"):
        train(make_chat(), method, roles)
    assert method.log[4:] == ["enter", "leave"]


@dataclass(frozen=True, kw_only=True)
class Shifted(Method):
    """Trains under a constant shift of the activations of every layer."""

    kept: bool = True

    def step(self, context: Context, batch: Any) -> StepOut:
        generator = torch.Generator().manual_seed(0)
        shift = {name: torch.randn(32, generator=generator) for name in context.sites("attention")}
        if self.kept:
            context.keep(context.inject(shift))
            return StepOut(loss=context.ce(batch))
        with context.inject(shift):
            return StepOut(loss=context.ce(batch))


@pytest.mark.parametrize("kept", [True, False])
def test_checkpointing_changes_nothing_for_what_is_kept(kept: bool, make_chat: MakeChat, roles: dict[str, Any]) -> None:
    """And does for what is not, which is why `keep` exists."""
    plain, checkpointed = make_chat(), make_chat()
    checkpointed.network.activation_checkpointing_enable()
    for chat in (plain, checkpointed):
        train(chat, Shifted(kept=kept), roles, optimizer=Optimizer(name="sgd"))
        assert hooks(chat.network) == 0
    differences = [
        (one - other).abs().max().item()
        for one, other in zip(plain.network.parameters(), checkpointed.network.parameters(), strict=True)
    ]
    assert (max(differences) < 1e-6) is kept


# The model before tuning


@dataclass(frozen=True, kw_only=True)
class Referring(Method):
    """Asks for the reference in `setup` and in the last step."""

    seen: list[Tensor] = field(default_factory=list)

    def setup(self, context: Context) -> None:
        context.predict_before(context.streams["main"].batch(0))

    def step(self, context: Context, batch: Any) -> StepOut:
        loss = context.ce(batch)
        if context.step == 2:
            random_state = torch.get_rng_state()
            self.seen.append(context.predict_before(context.streams["main"].batch(0)).logits)
            assert torch.equal(torch.get_rng_state(), random_state)
            assert context.network.training
            assert not self.seen[0].requires_grad
        return StepOut(loss=loss)


@pytest.mark.parametrize("trainable", [FullParameter(), LORA, LoRA(rank=2, alpha=8.0, adapter="continued")])
def test_reference_is_the_initial_model_after_steps(
    trainable: Trainable, make_chat: MakeChat, roles: dict[str, Any], tmp_path: Path, make_context: MakeContext
) -> None:
    """Also with dropout, and for an adapter that goes on: there the initial model has the adapter on."""
    chat, method = make_chat(dropout=0.3), Referring()
    train(chat, Method(), roles, trainable=LORA)  # the defense
    adapters.save_adapter(chat, tmp_path)
    adapters.merge(chat)
    batch = make_context(chat).streams["main"].batch(0)
    with torch.no_grad():
        expected = chat.network(input_ids=batch.input_ids).logits
    train(chat, method, roles, trainable=trainable, adapter=tmp_path)
    with torch.no_grad():
        trained = chat.network(input_ids=batch.input_ids).logits
    torch.testing.assert_close(method.seen[0], expected[:, :-1], rtol=1e-4, atol=1e-4)
    assert (trained - expected).abs().max() > 0.1


def test_reference_after_the_first_step_is_refused(make_chat: MakeChat, make_context: MakeContext) -> None:
    """For full parameters it would be a copy of weights that have moved."""
    context = make_context(make_chat())
    context.step = 1
    with pytest.raises(AssertionError, match="setup"):
        context.predict_before(context.draw("main"))


# Editing


@pytest.mark.parametrize("adapted", [False, True])
def test_edit_adds_to_a_weight_matrix(adapted: bool, make_chat: MakeChat, make_context: MakeContext) -> None:
    """Below an adapter it is the same edit of the same function, and the adapter stays."""
    name = "model.layers.1.self_attn.q_proj.weight"
    dense, chat = make_chat(), make_chat()
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense.network.get_parameter(name).add_(delta)
    if adapted:
        prepare_trainable(chat, LORA, seed=0)
    context = make_context(chat)
    context.edit(name, delta)
    batch = context.draw("main")
    assert torch.equal(context.forward(batch).logits, make_context(dense).forward(batch).logits)
    assert adapters.is_adapted(chat) is adapted
    with pytest.raises(ValueError, match="0 weights of that name"):
        context.edit("model.layers.9.weight", delta)


@pytest.mark.parametrize("adapted", [False, True])
def test_matrices_are_all_but_vectors_and_adapters(
    adapted: bool, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """By the names of the network itself, which `edit` takes."""
    chat = make_chat()
    expected = {name for name, weight in chat.network.named_parameters() if weight.ndim == 2}
    if adapted:
        prepare_trainable(chat, LORA, seed=0)
    context = make_context(chat)
    assert context.matrices().keys() == expected
    for name, weight in context.matrices().items():
        context.edit(name, -weight)
    assert not any(weight.any() for weight in context.matrices().values())


# Losses


def test_ce_ignores_padding_columns(make_chat: MakeChat, make_context: MakeContext) -> None:
    """Without an attention mask: no label looks at padding on the right."""
    context = make_context(make_chat())
    batch = context.draw("main")
    padded = type(batch)(
        input_ids=F.pad(batch.input_ids, (0, 5), value=7),
        labels=F.pad(batch.labels, (0, 5), value=-100),
        attention_mask=F.pad(batch.attention_mask, (0, 5)),
    )
    expected = context.ce(batch).item()
    assert context.ce(padded).item() == pytest.approx(expected, rel=1e-6)
    masked = context.network(input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=padded.labels)
    assert masked.loss.item() == pytest.approx(expected, rel=1e-6)
