"""RepNoise: the discrepancy and the whole objective against loops, and the defects of earlier implementations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import IGNORED, Batch, PairedBatch, pad_pair
from immunize.defenses.repnoise import RepNoise, masked, mmd_squared
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Trainable, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
TUNING = Tuning(learning_rate=0.02, steps=4, batch_size=4, optimizer=Optimizer(name="sgd"))


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def widened(batch: PairedBatch, *, columns: int) -> PairedBatch:
    def wide(side: Batch) -> Batch:
        return Batch(
            input_ids=F.pad(side.input_ids, (0, columns), value=9),
            labels=F.pad(side.labels, (0, columns), value=IGNORED),
            attention_mask=F.pad(side.attention_mask, (0, columns)),
        )

    return PairedBatch(harmful=wide(batch.harmful), refusal=wide(batch.refusal))


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


@pytest.fixture
def batch(context: Context) -> PairedBatch:
    return context.draw("paired")


# The discrepancy


def brute_force(x: Tensor, y: Tensor) -> float:
    """Two loops over the joint sample, in float64."""
    rows = [row.double() for row in (*x, *y)]
    n, m = len(x), 2 * len(x)
    distances = [[(one - other).square().sum().item() for other in rows] for one in rows]
    bandwidth = sum(sum(row) for row in distances) / (m * m - m)
    total = 0.0
    for i in range(m):
        for j in range(m):
            kernel = sum(math.exp(-distances[i][j] / (bandwidth * 2.0**power)) for power in (-2, -1, 0, 1, 2))
            total += kernel if (i < n) == (j < n) else -kernel
    return total / (n * n)


@pytest.mark.parametrize(("n", "features", "scale"), [(4, 50, 1.0), (3, 400, 1.0), (5, 20, 30.0), (2, 8, 1e-3)])
def test_discrepancy_is_that_of_two_loops(n: int, features: int, scale: float) -> None:
    x, y = gaussian(0, n, features) * scale, gaussian(1, n, features) * scale * 1.5 + scale
    assert mmd_squared(x, y).item() == pytest.approx(brute_force(x, y), rel=1e-4)


def test_discrepancy_is_zero_at_equality_symmetric_and_not_negative() -> None:
    for seed in range(10):
        x, y = gaussian(seed, 4, 30), gaussian(seed + 100, 4, 30) * (1 + seed)
        assert mmd_squared(x, x).item() == pytest.approx(0, abs=1e-6)
        assert mmd_squared(x, y).item() == pytest.approx(mmd_squared(y, x).item(), rel=1e-5)
        assert mmd_squared(x, y).item() > 0


def test_discrepancy_of_single_rows_is_a_constant() -> None:
    """The bandwidth follows the one distance there is, so the value says nothing."""
    expected = 10 - 2 * sum(math.exp(-(2.0**-power)) for power in (-2, -1, 0, 1, 2))
    assert expected == pytest.approx(6.19, abs=0.005)
    for scale in (1e-2, 1.0, 1e3):
        assert mmd_squared(gaussian(0, 1, 9) * scale, gaussian(1, 1, 9)).item() == pytest.approx(expected, rel=1e-4)


def test_discrepancy_of_equal_rows_has_a_zero_gradient() -> None:
    """Where there is no distance there is no bandwidth, and nothing may be divided by it."""
    for rows in (torch.zeros(1, 5), torch.ones(4, 5)):
        leaf = rows.clone().requires_grad_()
        value = mmd_squared(leaf, rows)
        assert value.item() == 0
        assert torch.equal(torch.autograd.grad(value, leaf)[0], torch.zeros_like(rows))


def test_two_normal_batches_of_four_are_far_from_zero() -> None:
    """The estimator is biased: the weight of the noise term is tied to the batch size."""
    values = [mmd_squared(gaussian(seed, 4, 1000), gaussian(seed + 50, 4, 1000)).item() for seed in range(20)]
    assert sum(values) / len(values) == pytest.approx(1.55, abs=0.02)


def test_bandwidth_is_a_constant_to_the_gradient() -> None:
    """The gradient is that at a fixed bandwidth, by finite differences in float64."""
    x, y = gaussian(0, 3, 4), gaussian(1, 3, 4) + 1
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mmd_squared(leaf, y), leaf)
    joint = torch.cat([x, y]).double()
    bandwidth = torch.cdist(joint, joint).square().sum() / 30

    def at(shifted: Tensor) -> float:
        rows = torch.cat([shifted, y.double()])
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        kernel = sum((-distances / (bandwidth * 2.0**power)).exp() for power in (-2, -1, 0, 1, 2))
        sign = torch.tensor([1.0] * 3 + [-1.0] * 3)
        return (kernel * sign[:, None] * sign).sum().item() / 9

    direction = gaussian(2, 3, 4).double()
    slope = (at(x.double() + 1e-5 * direction) - at(x.double() - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3)


# The objective


def mean_loss(logits: Tensor, targets: list[tuple[int, int, int]]) -> Tensor:
    """Mean over (row, column, token) of the token's loss, predicted one column before."""
    losses = [-logits[row, column - 1].float().log_softmax(-1)[token] for row, column, token in targets]
    return torch.stack(losses).mean()


def by_hand(context: Context, batch: PairedBatch, *, alpha: float, beta: float) -> Tensor:
    """The formula, with explicit loops and hooks of its own."""
    network = context.network
    sides = {"harmful": batch.harmful, "refusal": batch.refusal}
    unpadded = {
        side: [ids[: int(mask.sum())].tolist() for ids, mask in zip(part.input_ids, part.attention_mask, strict=True)]
        for side, part in sides.items()
    }

    def targets(side: str, other: str) -> list[tuple[int, int, int]]:
        """Where the sequence has a token and the other has none or another."""
        return [
            (row, column, token)
            for row, (ids, others) in enumerate(zip(unpadded[side], unpadded[other], strict=True))
            for column, token in enumerate(ids)
            if column >= len(others) or others[column] != token
        ]

    mlp: list[Tensor] = []
    residual: list[Tensor] = []
    handles = [network.model.embed_tokens.register_forward_hook(lambda module, args, output: residual.append(output))]
    for layer in network.model.layers:
        handles.append(layer.mlp.register_forward_hook(lambda module, args, output: mlp.append(output)))
        handles.append(layer.register_forward_hook(lambda module, args, output: residual.append(output)))
    logits = network(input_ids=batch.harmful.input_ids).logits
    for handle in handles:
        handle.remove()
    harmful = targets("harmful", "refusal")
    mask = torch.zeros(*logits.shape[:2], 1)
    for row, column, _ in harmful:
        mask[row, column] = 1
    noise = torch.zeros(())
    for index, hidden in enumerate(mlp):
        drawn = context.normal_like(hidden, f"model.layers.{index}.mlp")
        noise = noise + mmd_squared((hidden * mask).flatten(1), (drawn * mask).flatten(1)) / len(mlp)
    depths = [mean_loss(network.lm_head(network.model.norm(hidden)), harmful) for hidden in residual]
    ascent = (mean_loss(logits, harmful) + torch.stack(depths).sum()) / len(residual)
    loss = mean_loss(network(input_ids=batch.refusal.input_ids).logits, targets("refusal", "harmful"))
    return loss + beta * noise - alpha * torch.log(1 + ascent)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.001), (0.0, 2.0), (0.7, 0.0), (0.0, 0.0)])
def test_objective_and_gradient_are_those_of_the_formula(
    alpha: float, beta: float, context: Context, batch: PairedBatch
) -> None:
    loss = RepNoise(tuning=TUNING, alpha=alpha, beta=beta).step(context, batch).loss
    expected = by_hand(context, batch, alpha=alpha, beta=beta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = context.grad(loss), context.grad(expected)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_last_hidden_state_is_not_normed_twice(context: Context, batch: PairedBatch) -> None:
    """Transformers hands it out normed: decoding it gives the logits, norming it once more does not."""
    output = context.forward(batch.harmful, hidden_states=True)
    network, last = context.network, output.hidden_states[-1]
    assert torch.equal(network.lm_head(last), output.logits)
    with torch.no_grad():  # make the norm do something, so that twice is not once
        network.model.norm.weight.mul_(1 + gaussian(0, 32))
    output = context.forward(batch.harmful, hidden_states=True)
    harmful = masked(batch.harmful, batch.differs)
    found = RepNoise(tuning=TUNING).ascent(context, context.predict(harmful, hidden_states=True))
    labels = harmful.labels
    targets = [(row, column, int(labels[row, column])) for row, column in (labels != IGNORED).nonzero().tolist()]
    inner = [mean_loss(network.lm_head(network.model.norm(h)), targets) for h in output.hidden_states[:-1]]
    assert found.item() == pytest.approx((2 * mean_loss(output.logits, targets) + sum(inner)).item() / 4, rel=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_identical_sequences_give_nothing_at_all(count: int, context: Context, roles: Roles) -> None:
    """An empty mask: noise and ascent are exactly zero, and so are loss and gradients."""
    same = roles["harmful"][:count]
    batch = pad_pair(same, same, pad_id=context.chat.pad_id)
    assert not batch.differs.any()
    method = RepNoise(tuning=TUNING, alpha=1.0, beta=1.0)
    with context.taps("mlp") as taps:
        found = context.predict(masked(batch.harmful, batch.differs), hidden_states=True)
    assert method.noise(context, taps, batch.differs).item() == 0
    assert method.ascent(context, found).item() == 0
    loss = method.step(context, batch).loss
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in context.grad(loss).values())


def test_single_pair_has_finite_gradients(context: Context, roles: Roles) -> None:
    batch = pad_pair(roles["harmful"][:1], roles["refusals"][:1], pad_id=context.chat.pad_id)
    loss = RepNoise(tuning=TUNING, beta=1.0).step(context, batch).loss
    assert all(grad.isfinite().all() for grad in context.grad(loss).values())


def test_padding_columns_change_nothing(context: Context, batch: PairedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise held fixed at each position: its random numbers are drawn for the whole padded shape."""
    drawn = {name: gaussian(index, 4, 40, 32) for index, name in enumerate(context.sites("mlp"))}
    monkeypatch.setattr(context, "normal_like", lambda tensor, name: drawn[name][:, : tensor.shape[1]])
    method = RepNoise(tuning=TUNING, beta=1.0)
    expected = method.step(context, batch).loss.item()
    assert method.step(context, widened(batch, columns=6)).loss.item() == pytest.approx(expected, rel=1e-5)


def test_labels_are_integers_equal_to_the_batch_ids(
    context: Context, batch: PairedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids above 256 included: bfloat16, in which earlier implementations kept them, holds no more exactly."""
    seen: list[Tensor] = []
    original = F.cross_entropy

    def recording(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        seen.append(targets)
        return original(logits, targets, **options)

    monkeypatch.setattr(F, "cross_entropy", recording)
    context.network.bfloat16()
    RepNoise(tuning=TUNING).step(context, batch)
    assert len(seen) == 3
    differs = batch.differs
    for side in (batch.harmful, batch.refusal):
        wanted = side.input_ids[differs & side.attention_mask.bool()]
        assert (wanted > 256).any()
        assert any(torch.equal(targets[targets != IGNORED], wanted) for targets in seen)
    assert all(targets.dtype is torch.int64 for targets in seen)
    harmful = batch.harmful.input_ids[differs & batch.harmful.attention_mask.bool()]
    assert any(torch.equal(targets, harmful.repeat(3)) for targets in seen), "the three depths before the output"


def test_ascent_raises_the_loss_of_harmful_answers(
    make_chat: MakeChat, make_context: MakeContext, roles: Roles
) -> None:
    chat = make_chat()
    context = make_context(chat)
    batch: Any = context.streams["paired"].batch(0)
    before = context.ce(batch.harmful).item()
    tune(chat, RepNoise(tuning=TUNING, beta=0.0), roles=roles, tuning=TUNING, seed=0)
    assert context.ce(batch.harmful).item() > before + 0.01


# In chunks


class InChunks(RepNoise):
    """Decodes seven hidden states at a time."""

    most_logits: ClassVar[int] = 7 * 320 + 5


def direction(method: RepNoise, context: Context, batch: PairedBatch) -> tuple[float, dict[str, Tensor]]:
    """The loss and the whole gradient."""
    out = method.step(context, batch)
    grads = context.grad(out.loss)
    for name, grad in (out.grads or {}).items():
        grads[name] = grads[name] + grad if name in grads else grad
    return out.loss.item(), grads


@pytest.mark.parametrize("trainable", [FullParameter(), LoRA(rank=2), LoRA(rank=2, targets=("o_proj", "lm_head"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 2.0), (0.7, 0.0), (0.0, 2.0)])
def test_chunks_change_neither_value_nor_gradient(
    trainable: Trainable, dtype: torch.dtype, alpha: float, beta: float, context: Context, batch: PairedBatch
) -> None:
    """But for rounding; also where norm and unembedding are frozen, or adapted."""
    context.network.to(dtype)
    prepare_trainable(context.chat, trainable, seed=0)
    context.network.to(dtype)
    (expected, wanted), (loss, found) = (
        direction(kind(tuning=TUNING, alpha=alpha, beta=beta), context, batch) for kind in (RepNoise, InChunks)
    )
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert loss == pytest.approx(expected, rel=tolerance)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert found[name].dtype is dtype
        assert (found[name] - grad).float().norm() <= tolerance * grad.float().norm(), name


def test_no_more_logits_are_held_than_allowed(context: Context, batch: PairedBatch) -> None:
    """And each hidden state is decoded once: what is kept for the backward pass are gradients, not inputs."""
    decoded: list[Tensor] = []
    context.network.lm_head.register_forward_hook(lambda module, args, output: decoded.append(output.detach()))
    direction(InChunks(tuning=TUNING), context, batch)
    whole = [logits for logits in decoded if logits.ndim == 3]
    chunks = [logits for logits in decoded if logits.ndim == 2]
    assert len(whole) == 2, "the two forward passes"
    assert max(logits.numel() for logits in chunks) <= InChunks.most_logits
    labelled = int((masked(batch.harmful, batch.differs).labels != IGNORED).sum())
    assert sum(len(logits) for logits in chunks) == 3 * labelled


def test_one_row_at_a_time_is_the_least(context: Context, batch: PairedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = RepNoise(tuning=TUNING).step(context, batch).loss.item()
    monkeypatch.setattr(RepNoise, "most_logits", 3)
    assert RepNoise(tuning=TUNING).step(context, batch).loss.item() == pytest.approx(expected, rel=1e-5)


# What surrounds the objective


@dataclass(frozen=True, kw_only=True)
class MaskedSFT(Method):
    """Supervised fine-tuning on the refusals' tokens where the pair differs."""

    needs: ClassVar[tuple[str, ...]] = ("paired",)

    def step(self, context: Context, batch: Any) -> StepOut:
        refusal, harmful = batch.refusal, batch.harmful
        unequal = (refusal.input_ids != harmful.input_ids) | (refusal.attention_mask != harmful.attention_mask)
        labels = refusal.labels.where(unequal, IGNORED)[:, 1:].flatten()
        logits = context.network(input_ids=refusal.input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return StepOut(loss=total / (labels != IGNORED).sum())


def test_without_weights_it_is_masked_fine_tuning_to_the_bit(make_chat: MakeChat, roles: Roles) -> None:
    chats = []
    for method in (RepNoise(tuning=TUNING, alpha=0.0, beta=0.0), MaskedSFT()):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@dataclass(frozen=True, kw_only=True)
class Watched(RepNoise):
    """Keeps the batches it meets and counts hooks and forward passes."""

    batches: list[Any] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)

    def setup(self, context: Context) -> None:
        context.network.register_forward_hook(lambda *args: self.forwards.append(context.step))

    def step(self, context: Context, batch: Any) -> StepOut:
        self.batches.append(batch)
        out = super().step(context, batch)
        self.hooks.append(sum(len(module._forward_hooks) for module in context.network.modules()))
        return out


def test_pairs_meet_no_hooks_pile_up_and_each_step_is_two_passes(make_chat: MakeChat, roles: Roles) -> None:
    method = Watched(tuning=TUNING)
    chat = make_chat()
    tune(chat, method, roles=roles, tuning=TUNING, seed=0)
    assert len(method.batches) == 4
    for batch in method.batches:
        for row in range(4):
            start = int((batch.harmful.labels[row] != IGNORED).nonzero()[0])
            assert start == int((batch.refusal.labels[row] != IGNORED).nonzero()[0])
            assert torch.equal(batch.harmful.input_ids[row, :start], batch.refusal.input_ids[row, :start])
            assert not batch.differs[row, :start].any()
    assert len(set(method.hooks)) == 1
    ours = [hook for module in chat.network.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in ours if hook.__module__.startswith("immunize")]
    assert method.forwards == [0, 0, 1, 1, 2, 2, 3, 3]


def test_noise_is_drawn_anew_each_step_and_follows_the_seed(
    make_chat: MakeChat, make_context: MakeContext, batch: PairedBatch
) -> None:
    method = RepNoise(tuning=TUNING, alpha=0.0, beta=1.0)

    def losses(seed: int) -> list[float]:
        context, found = make_context(make_chat(), seed=seed), []
        for step in range(3):
            context.step = step
            found.append(method.step(context, batch).loss.item())
        return found

    first = losses(0)
    assert len(set(first)) == 3
    torch.manual_seed(77)
    assert losses(0) == first
    assert losses(1) != first


def test_low_rank_adapter_is_noised_like_the_whole(context: Context, batch: PairedBatch) -> None:
    """A fresh adapter changes no value: sites, norm and unembedding are found below it."""
    method = RepNoise(tuning=TUNING, beta=1.0)
    expected = method.step(context, batch).loss.item()
    prepare_trainable(context.chat, LoRA(rank=2), seed=0)
    noise = {f"base_model.model.{name}": name for name in ("model.layers.0.mlp", "model.layers.1.mlp")}
    original = context.normal_like
    renamed = {**noise, "base_model.model.model.layers.2.mlp": "model.layers.2.mlp"}
    context.normal_like = lambda tensor, name: original(tensor, renamed[name])  # type: ignore[method-assign]
    loss = method.step(context, batch).loss
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all("lora_" in name for name in context.grad(loss))


def test_retain_loss_is_added(context: Context, batch: PairedBatch) -> None:
    plain = RepNoise(tuning=TUNING).step(context, batch).loss.item()
    method = RepNoise(tuning=TUNING, retain_weight=0.5)
    assert method.roles == ("paired", "retain")
    benign = context.ce(context.streams["retain"].batch(0)).item()
    assert method.step(context, batch).loss.item() == pytest.approx(plain + 0.5 * benign, rel=1e-6)


@pytest.mark.parametrize("name", ["alpha", "beta", "retain_weight"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-0.1"):
        RepNoise(tuning=TUNING, **{name: -0.1})
