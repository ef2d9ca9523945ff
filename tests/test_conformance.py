"""What every method must keep, whatever it computes: one table, one line a method.

A method of one's own is listed by a module of one's own, which holds such a line in `METHODS` (or in `EDITS`, for a
method that trains nothing, or in `REPAIRS`, for a post-stage one), and whose name is put into the environment:

    from tests.test_conformance import Case, on_batch
    METHODS = {"own": Case(make=Own, settings={"strength": 0.1}, neutral={"strength": 0.0}, objective=on_batch)}

    PYTHONPATH=. IMMUNIZE_CONFORMANCE=own_cases pytest tests/test_conformance.py -k own
"""

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from immunize import config, validation
from immunize.data.batches import IGNORED, Batch, FixedBatches, PairedBatch, Stream
from immunize.defenses.adversarial_loss import AdversarialLoss
from immunize.defenses.antidote import Antidote
from immunize.defenses.booster import Booster
from immunize.defenses.circuit_breakers import CircuitBreakers
from immunize.defenses.constrained_sft import ConstrainedSFT
from immunize.defenses.deep_refusals import DeepRefusals
from immunize.defenses.kl_anchor import KLAnchor
from immunize.defenses.ldifs import LDIFS
from immunize.defenses.lisa import Lisa
from immunize.defenses.lox import LoX
from immunize.defenses.pruning import PostPruning, Pruning
from immunize.defenses.random_perturbation import PostRandomPerturbation, RandomPerturbation
from immunize.defenses.repnoise import RepNoise, masked_loss
from immunize.defenses.resta import RESTA
from immunize.defenses.safe_instr import SafeInstr
from immunize.defenses.safe_lora import SafeLoRA
from immunize.defenses.safety_sft import SafetySFT
from immunize.defenses.tar import TAR
from immunize.defenses.vaccine import Vaccine
from immunize.defenses.vlguard import VLGuard
from immunize.instantiate import instantiate
from immunize.models import predictions
from immunize.models.loading import ChatModel
from immunize.models.sources import ModelSource
from immunize.training.context import Context
from immunize.training.defense import AlignmentDefense, Defense, PostDefense, WeightEdit
from immunize.training.method import Method, StepOut
from immunize.training.tune import Repair, make_streams, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Trainable, Tuning

MakeChat = Callable[..., ChatModel]
Roles = dict[str, Any]
Objective = Callable[[Context, Any], Tensor]
STEPS, LAYERS = 10, 2
FULL, LORA = FullParameter(), LoRA(rank=2, alpha=8.0, dropout=0.2)
TUNING = Tuning(learning_rate=0.01, steps=STEPS, batch_size=4, optimizer=Optimizer(weight_decay=0.1))
PLAIN = replace(TUNING, steps=3, optimizer=Optimizer(name="sgd", clip=None))  # its updates are its gradients


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a method is made, and the settings at which it is fine-tuning on `objective` and nothing else.

    `objective(context, batch)` is the loss of the method's own main batch there; None where there are no such settings.
    Benign conversations come beside it with the weight that the method has. `takes_tuning` is false for a method that
    acts inside the user's.
    """

    make: Callable[..., Defense]
    settings: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective | None = None
    takes_tuning: bool = True

    def method(self, tuning: Tuning = TUNING, **changes: Any) -> Any:
        own = {"tuning": tuning} if self.takes_tuning else {}
        return self.make(**own, **{**self.settings, **changes})


@dataclass(frozen=True, kw_only=True)
class Edit:
    """How a method is made that only edits weights, and the settings at which it leaves them as they are.

    `seeded` says whether the run's seed has a say.
    """

    make: Callable[..., WeightEdit]
    settings: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = True

    def apply(self, chat: ChatModel, *, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
        """The weights after it."""
        method = self.make(**{**self.settings, **changes})
        assert (method.roles, method.passes, method.tuning.steps) == ((), 0, 0)
        tune(chat, method, roles={}, tuning=method.tuning, seed=seed)
        return parameters(chat)


@dataclass(frozen=True, kw_only=True)
class Post:
    """How a post-stage defense is made, and the settings at which it leaves the tuned weights as they are.

    `neutral` is None where there are no such settings.
    """

    make: Callable[..., PostDefense]
    settings: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = None

    def method(self, **changes: Any) -> PostDefense:
        return self.make(**{**self.settings, **changes})


def on_batch(context: Context, batch: Any) -> Tensor:
    return context.ce(batch)


def on_refusals(context: Context, batch: Any) -> Tensor:
    return context.ce(batch.refusal)


def where_pairs_differ(context: Context, batch: Any) -> Tensor:
    return masked_loss(context, batch.refusal, batch.differs)


def on_nothing(context: Context, batch: Any) -> Tensor:
    """Benign conversations alone."""
    return torch.zeros(())


class InChunks(RepNoise):
    """As with a vocabulary that is large."""

    most_logits: ClassVar[int] = 3000


ATTACKERS = {"inner_steps": 3, "every": 2, "inner_rates": (1e-3, 1e-2)}
METHODS: dict[str, Case] = {
    "safety_sft": Case(make=SafetySFT, objective=on_batch),
    "adversarial_loss": Case(
        make=AdversarialLoss,
        settings={"weight": 0.5, "form": "log", "retain_weight": 1.0},
        neutral={"weight": 0.0},
        objective=on_refusals,
    ),
    "repnoise": Case(
        make=RepNoise,
        settings={"alpha": 0.5, "beta": 0.1},
        neutral={"alpha": 0.0, "beta": 0.0},
        objective=where_pairs_differ,
    ),
    "repnoise_in_chunks": Case(make=InChunks, settings={"alpha": 0.5, "beta": 0.1, "retain_weight": 0.5}),
    "vaccine": Case(
        make=Vaccine,
        settings={"radius": 2.0, "retain_weight": 0.5},
        neutral={"radius": 0.0},
        objective=on_batch,
    ),
    "vaccine_random": Case(
        make=Vaccine,
        settings={"radius": 2.0, "direction": "random"},
        neutral={"radius": 0.0},
        objective=on_batch,
    ),
    "booster": Case(
        make=Booster,
        settings={"weight": 2.0, "radius": 0.3, "retain_weight": 0.5},
        neutral={"weight": 0.0},
        objective=on_batch,
    ),
    "tar": Case(
        make=TAR,
        settings={"objective": "entropy", **ATTACKERS},
        neutral={"resistance_weight": 0.0, "representation_weight": 0.0},
        objective=on_nothing,
    ),
    "tar_paper": Case(make=TAR, settings={"objective": "preference", **ATTACKERS}),
    "circuit_breakers": Case(make=CircuitBreakers, settings={"layers": (0, 1), "start_noise": 0.02}),
    "deep_refusals": Case(
        make=DeepRefusals,
        settings={"max_tokens": 4, "retain_weight": 0.5},
        neutral={"share": 0.0},
        objective=on_refusals,
    ),
    "lisa": Case(
        make=Lisa,
        settings={"weight": 0.5, "alignment_steps": 1, "user_steps": 2, "free_share": 0.1},
        neutral={"alignment_steps": 0},
        objective=on_batch,
        takes_tuning=False,
    ),
    "constrained_sft": Case(
        make=ConstrainedSFT,
        settings={"first": 0.5, "early": 2.0, "late": 0.1, "early_tokens": 3},
        neutral={"first": 0.0, "early": 0.0, "late": 0.0},
        objective=on_batch,
        takes_tuning=False,
    ),
    "safe_instr": Case(
        make=SafeInstr, settings={"share": 0.5}, neutral={"share": 0.0}, objective=on_batch, takes_tuning=False
    ),
    "vlguard": Case(
        make=VLGuard, settings={"weight": 0.5}, neutral={"weight": 0.0}, objective=on_batch, takes_tuning=False
    ),
    "ldifs": Case(
        make=LDIFS, settings={"weight": 5.0}, neutral={"weight": 0.0}, objective=on_batch, takes_tuning=False
    ),
    "kl_anchor": Case(
        make=KLAnchor, settings={"weight": 0.5}, neutral={"weight": 0.0}, objective=on_batch, takes_tuning=False
    ),
    "kl_anchor_refusals": Case(
        make=KLAnchor,
        settings={"weight": 0.5, "held_on": "refusals"},
        neutral={"weight": 0.0},
        objective=on_batch,
        takes_tuning=False,
    ),
}


class Unaligned(ModelSource):
    """The tiny model with other weights; the fixture says where it lies."""

    folder = ""
    name = "unaligned"

    @property
    def location(self) -> str:
        return self.folder


EDITS: dict[str, Edit] = {
    "lox": Edit(make=LoX, settings={"base": Unaligned(), "rank": 3}, neutral={"scale": 0.0}, seeded=False),
    "random_perturbation": Edit(make=RandomPerturbation, settings={"share": 0.1}, neutral={"share": 0.0}),
    "random_pruning": Edit(make=Pruning, settings={"share": 0.1, "criterion": "random"}, neutral={"share": 0.0}),
    "magnitude_pruning": Edit(
        make=Pruning, settings={"share": 0.1, "criterion": "magnitude"}, neutral={"share": 0.0}, seeded=False
    ),
}
REPAIRS: dict[str, Post] = {
    "antidote": Post(make=Antidote, settings={"share": 0.2, "samples": 6}, neutral={"share": 0.0}),
    "antidote_global": Post(
        make=Antidote, settings={"share": 0.2, "samples": 6, "ranking": "global"}, neutral={"share": 0.0}
    ),
    "safe_lora": Post(make=SafeLoRA, settings={"base": Unaligned(), "threshold": 1.0}, neutral={"threshold": -1.0}),
    "resta": Post(
        make=RESTA,
        settings={"unsafe_tuning": TUNING, "gamma": 0.5, "drop": 0.3},
        neutral={"gamma": 0.0, "drop": 0.0},
    ),
    "post_random_pruning": Post(
        make=PostPruning, settings={"share": 0.2, "criterion": "random"}, neutral={"share": 0.0}
    ),
    "post_magnitude_pruning": Post(
        make=PostPruning, settings={"share": 0.2, "criterion": "magnitude"}, neutral={"share": 0.0}
    ),
    "post_random_perturbation": Post(make=PostRandomPerturbation, settings={"share": 0.2}, neutral={"share": 0.0}),
}
if "IMMUNIZE_CONFORMANCE" in os.environ:
    own = importlib.import_module(os.environ["IMMUNIZE_CONFORMANCE"])
    METHODS.update(getattr(own, "METHODS", {}))
    EDITS.update(getattr(own, "EDITS", {}))
    REPAIRS.update(getattr(own, "REPAIRS", {}))
EACH = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS.keys())
EACH_EDIT = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
EACH_REPAIR = pytest.mark.parametrize("post", REPAIRS.values(), ids=REPAIRS.keys())
EACH_NEUTRAL = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in METHODS.items() if case.objective]
)
BOTH = pytest.mark.parametrize("trainable", [FULL, LORA], ids=["full", "lora"])


@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    """Supervised fine-tuning on the data of another method."""

    like: Defense
    objective: Objective

    @property
    def roles(self) -> tuple[str, ...]:
        return self.like.roles

    def step(self, context: Context, batch: Any) -> StepOut:
        loss = self.objective(context, batch)
        return StepOut(loss=self.like.with_retain(context, loss) if isinstance(self.like, AlignmentDefense) else loss)


@dataclass(frozen=True, kw_only=True)
class Around(Method):
    """Another method, with something done around each of its steps."""

    inner: Defense
    around: Callable[[Context], AbstractContextManager[None]] = lambda context: nullcontext()

    @property
    def roles(self) -> tuple[str, ...]:
        return self.inner.roles

    def setup(self, context: Context) -> None:
        self.inner.setup(context)

    def step(self, context: Context, batch: Any) -> StepOut:
        with self.around(context):
            return self.inner.step(context, batch)

    def before_update(self, context: Context) -> None:
        self.inner.before_update(context)

    def after_update(self, context: Context) -> None:
        self.inner.after_update(context)

    def finish(self, context: Context) -> None:
        self.inner.finish(context)


@pytest.fixture
def chat(make_chat: MakeChat) -> Callable[..., ChatModel]:
    return lambda **options: make_chat(layers=LAYERS, **options)


def parameters(chat: ChatModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in chat.network.named_parameters()}


def differences(one: ChatModel, other: ChatModel) -> float:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return max((first - second).abs().max().item() for first, second in pairs)


def streams(chat: ChatModel, method: Method, roles: Roles, kind: type[Stream] = Stream) -> dict[str, Stream]:
    chosen = {role: roles[role] for role in method.roles}
    made = make_streams(chosen, batch_size=TUNING.batch_size, pad_id=chat.pad_id, seed=0)
    return {
        role: kind(**{name: getattr(stream, name) for name in Stream.__dataclass_fields__})
        for role, stream in made.items()
    }


# What it computes


@EACH_NEUTRAL
@BOTH
def test_neutral_settings_are_fine_tuning_to_the_bit(
    case: Case, trainable: Trainable, chat: MakeChat, roles: Roles
) -> None:
    """With dropout, too, and weight decay and clipping."""
    tuning = replace(TUNING, trainable=trainable)
    assert case.objective is not None
    method = case.method(tuning, **case.neutral)
    found, expected = chat(dropout=0.3), chat(dropout=0.3)
    tune(found, method, roles=roles, tuning=tuning, seed=0)
    tune(expected, FineTuning(like=method, objective=case.objective), roles=roles, tuning=tuning, seed=0)
    assert differences(found, expected) == 0


@EACH
@BOTH
def test_it_trains_what_it_is_told_to_and_the_same_twice(
    case: Case, trainable: Trainable, chat: MakeChat, roles: Roles
) -> None:
    """What is frozen keeps its bits under weight decay; the random state from before has no say."""
    tuning = replace(TUNING, trainable=trainable)
    found, again, start = chat(dropout=0.3), chat(dropout=0.3), parameters(chat())
    for tuned in (found, again):
        torch.rand(3)
        tune(tuned, case.method(tuning), roles=roles, tuning=tuning, seed=0)
    assert differences(found, again) == 0
    ended = parameters(found)
    assert all(tensor.isfinite().all() for tensor in ended.values())
    if trainable is FULL:
        assert not any(torch.equal(ended[name], tensor) for name, tensor in start.items() if tensor.ndim > 1)
        return
    below = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): name for name in ended}
    assert all(torch.equal(ended[below[name]], tensor) for name, tensor in start.items())
    factors = {name for name in ended if ".lora_B." in name}
    assert factors and all(ended[name].any() for name in factors)


@EACH
def test_half_precision_runs_in_half_precision(case: Case, chat: MakeChat, roles: Roles) -> None:
    half = chat()
    half.network.bfloat16()
    tune(half, case.method(), roles=roles, tuning=TUNING, seed=0)
    ended = parameters(half)
    assert all(tensor.dtype is torch.bfloat16 and tensor.isfinite().all() for tensor in ended.values())
    start = parameters(chat())
    assert any(not torch.equal(ended[name], tensor.bfloat16()) for name, tensor in start.items())


# What it leaves behind


@EACH
@BOTH
def test_a_step_leaves_nothing_behind(case: Case, trainable: Trainable, chat: MakeChat, roles: Roles) -> None:
    """No `.grad`, no moved weight, no other mode and no drawn random number: noise follows from seed, step and name.

    Where there is dropout, a second pass draws other masks; the engine seeds each step anew, so that none of it reaches
    the next.
    """
    tuning = replace(TUNING, trainable=replace(trainable, dropout=0.0) if trainable is LORA else trainable)

    class Unchanged:
        def __init__(self, context: Context) -> None:
            self.network = context.network

        def state(self) -> dict[str, Any]:
            named = dict(self.network.named_parameters())
            gradients = {f"grad of {name}": parameter.grad for name, parameter in named.items()}
            return {"random": torch.get_rng_state(), "mode": torch.tensor(self.network.training), **named, **gradients}

        def __enter__(self) -> None:
            self.before = {name: None if item is None else item.clone() for name, item in self.state().items()}
            assert self.before["mode"]

        def __exit__(self, *error: Any) -> None:
            for name, now in self.state().items():
                before = self.before.pop(name)
                assert now is before is None or torch.equal(now, before), name
            assert not self.before

    tuned = chat()
    tune(tuned, Around(inner=case.method(tuning), around=Unchanged), roles=roles, tuning=tuning, seed=0)
    hooks = [hook for module in tuned.network.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("immunize")]
    assert not tuned.network.training


@EACH
@BOTH
def test_passes_are_those_it_declares(case: Case, trainable: Trainable, chat: MakeChat, roles: Roles) -> None:
    """A backward pass is counted where it comes through the first layer, and is worth two forward passes.

    Each counts as the share of a batch that it holds.
    """
    counts = {"forward": 0.0, "backward": 0.0}

    def count(module: Any, arguments: Any, output: Tensor) -> None:
        share = len(output) / TUNING.batch_size
        counts["forward"] += share
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update(backward=counts["backward"] + share))

    class Counting:
        def __init__(self, context: Context) -> None:
            self.context = context

        def __enter__(self) -> None:
            found = [self.context.network, self.context._reference]
            layers = [next(iter(_layers(network))) for network in found if network is not None]
            self.handles = [layer.register_forward_hook(count) for layer in layers]

        def __exit__(self, *error: Any) -> None:
            for handle in self.handles:
                handle.remove()

    tuning = replace(TUNING, trainable=trainable)
    method = case.method(tuning)
    tune(chat(), Around(inner=method, around=Counting), roles=roles, tuning=tuning, seed=0)
    assert (counts["forward"] + 2 * counts["backward"]) / 3 == pytest.approx(method.passes * STEPS)


def _layers(network: Any) -> Any:
    return chain.from_iterable(m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)


# How it is run


@EACH
@BOTH
def test_activation_checkpointing_changes_nothing(
    case: Case, trainable: Trainable, chat: MakeChat, roles: Roles
) -> None:
    tuning = replace(PLAIN, trainable=replace(trainable, dropout=0.0) if trainable is LORA else trainable)
    plain, checkpointed = chat(), chat()
    checkpointed.network.activation_checkpointing_enable()
    for tuned in (plain, checkpointed):
        tune(tuned, case.method(tuning), roles=roles, tuning=tuning, seed=0)
    assert differences(plain, checkpointed) < 1e-6


class Wide(Stream):
    """Five columns of padding more than needed, of another token."""

    def batch(self, number: int) -> Batch | PairedBatch:
        batch = super().batch(number)
        if isinstance(batch, PairedBatch):
            return PairedBatch(harmful=self.wide(batch.harmful), refusal=self.wide(batch.refusal))
        return self.wide(batch)

    def wide(self, batch: Batch) -> Batch:
        return Batch(
            input_ids=F.pad(batch.input_ids, (0, 5), value=9),
            labels=F.pad(batch.labels, (0, 5), value=IGNORED),
            attention_mask=F.pad(batch.attention_mask, (0, 5)),
        )


def direction(
    case: Case, chat: ChatModel, roles: Roles, *, kind: type[Stream] = Stream
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a first step, the noise at each position held fixed: it is drawn for the padded shape."""
    method = case.method()
    chat.network.train()
    context = Context(chat, streams=streams(chat, method, roles, kind), seed=0, steps=STEPS)
    original = context.normal_like

    def fixed(tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim < 3:
            return original(tensor, name)
        return original(tensor.new_zeros(len(tensor), 64, tensor.shape[-1]), name)[:, : tensor.shape[1]]

    context.normal_like = fixed  # type: ignore[method-assign]
    method.setup(context)
    out = method.step(context, context.streams[method.roles[0]].batch(0))
    grads = context.grad(out.loss)
    context.release()
    for name, grad in (out.grads or {}).items():
        grads[name] = grads[name] + grad if name in grads else grad
    return out.loss.item(), grads


def assert_same(expected: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]]) -> None:
    """But for rounding."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@EACH
def test_columns_of_padding_change_nothing(case: Case, chat: MakeChat, roles: Roles) -> None:
    assert_same(direction(case, chat(), roles), direction(case, chat(), roles, kind=Wide))


@EACH
def test_what_carries_no_label_need_not_be_decoded(
    case: Case, chat: MakeChat, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a large vocabulary, where only the labelled positions are."""
    expected = direction(case, chat(), roles)
    monkeypatch.setattr(predictions, "MOST_LOGITS", 0)
    assert_same(expected, direction(case, chat(), roles))


@dataclass(frozen=True, kw_only=True)
class Twice(Around):
    """Draws for the second of two micro-batches what it drew for the first."""

    seen: dict[str, Any] = field(default_factory=dict)

    def step(self, context: Context, batch: Any) -> StepOut:
        if self.seen.get("step") == context.step:
            context._drawn.update(self.seen["drawn"])
        self.seen.update(step=context.step, drawn=dict(context._drawn))
        return super().step(context, batch)


class Doubled(FixedBatches):
    """Each micro-batch twice."""

    def __getitem__(self, number: int) -> Batch | PairedBatch:
        batch = super().__getitem__(number // 2)
        return batch if isinstance(batch, PairedBatch) else replace(batch, share=1.0)


@EACH
def test_two_equal_micro_batches_are_one(
    case: Case, chat: MakeChat, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that cleared gradients in the middle of a step would lose the first of them."""
    doubled, single, accumulating = chat(), chat(), replace(PLAIN, batch_size=8, micro_batch=4)
    tune(single, case.method(PLAIN), roles=roles, tuning=PLAIN, seed=0)
    monkeypatch.setattr("immunize.training.tune.FixedBatches", Doubled)
    monkeypatch.setattr(Stream, "_length", lambda stream, index: 0)  # dealt out as drawn, like whole batches
    twice = Twice(inner=case.method(accumulating))
    spent = tune(doubled, twice, roles=roles, tuning=accumulating, seed=0)
    assert (spent.steps, twice.seen["step"]) == (PLAIN.steps, PLAIN.steps - 1)
    assert differences(doubled, single) < 1e-6
    assert differences(doubled, chat()) > 1e-4


# In two processes

LAUNCHED = replace(TUNING, steps=3)
ALONE = {"plain": LAUNCHED, "plain_micro_batches": replace(LAUNCHED, micro_batch=1)}


@pytest.fixture(scope="module")
def processes(make_chat: MakeChat, roles: Roles, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes was left with after three steps by every method, one launch for all."""
    folder = tmp_path_factory.mktemp("two_processes")
    make_chat(layers=LAYERS).save(folder / "model")
    (folder / "roles.pickle").write_bytes(pickle.dumps(roles))
    command = [sys.executable, "-m", "tests.two_processes", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert all((folder / f"{rank}.pt").exists() for rank in (0, 1)), done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*METHODS, *ALONE])
def test_two_processes_share_each_batch_and_end_equal(
    name: str, processes: list[dict[str, Any]], chat: MakeChat, roles: Roles
) -> None:
    """Each takes its own rows, of what a method draws, too, which together are those that one process would take."""
    first, second = (process[name] for process in processes)
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(tensor, second["weights"][key]) for key, tensor in first["weights"].items())
    start = chat().network.state_dict()
    assert any(not torch.equal(tensor, first["weights"][key]) for key, tensor in start.items())
    seeds = [*first["seeds"], *second["seeds"]]
    assert len(set(seeds)) == len(seeds) >= 2 * LAUNCHED.steps, "dropout masks of their own"
    method: Method = METHODS[name].method(LAUNCHED) if name in METHODS else Method()
    made = streams(chat(), method, roles)
    assert first["rows"].keys() == second["rows"].keys() and "main" in first["rows"]
    for role, taken in first["rows"].items():
        stream = made[method.roles[0] if role == "main" else role]
        flat = [row for pair in zip(taken, second["rows"][role], strict=True) for part in pair for row in part]
        for number in range(len(flat) // 4):
            wanted = [list(stream.examples[index].ids) for index in stream.indices(number)]
            assert sorted(flat[4 * number : 4 * number + 4]) == sorted(wanted)
        assert flat and len(flat) % 4 == 0


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_are_one_in_fine_tuning(
    name: str, processes: list[dict[str, Any]], chat: MakeChat, roles: Roles
) -> None:
    """But for rounding, though their answers have different lengths; also in micro-batches of a single row."""
    single = chat()
    tune(single, Method(), roles=roles, tuning=LAUNCHED, seed=0)
    found, start = processes[0][name]["weights"], chat().network.state_dict()
    for key, tensor in single.network.state_dict().items():
        moved = (tensor - start[key]).norm()
        assert (tensor - found[key]).norm() < 1e-3 * moved


# What only edits weights


@pytest.fixture(scope="session", autouse=True)
def unaligned(make_chat: MakeChat, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("unaligned")
    make_chat(layers=LAYERS, seed=1).save(folder / "weights")
    Unaligned.folder = str(folder / "weights")


@EACH_EDIT
def test_neutral_edit_changes_no_bit(edit: Edit, chat: MakeChat) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        edited = chat()
        edited.network.to(dtype)
        found, start = edit.apply(edited, **edit.neutral), parameters(chat())
        assert all(torch.equal(tensor, start[name].to(dtype)) for name, tensor in found.items())


@EACH_EDIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edit_is_of_every_matrix_and_follows_the_seed(edit: Edit, dtype: torch.dtype, chat: MakeChat) -> None:
    found = []
    for seed in (0, 0, 1):
        edited = chat()
        edited.network.to(dtype)
        torch.rand(3)
        found.append(edit.apply(edited, seed=seed))
    start = parameters(chat())
    for name, tensor in found[0].items():
        assert tensor.dtype is dtype and tensor.isfinite().all()
        assert torch.equal(tensor, start[name].to(dtype)) is (tensor.ndim == 1)
        assert torch.equal(tensor, found[1][name])
        assert torch.equal(tensor, found[2][name]) is (tensor.ndim == 1 or not edit.seeded)


@EACH_EDIT
def test_edit_leaves_nothing_behind(edit: Edit, chat: MakeChat, roles: Roles) -> None:
    """The random state is that after a tuning of no steps that does nothing in the end."""
    edited, untouched = chat(), chat()
    tune(untouched, Method(), roles={"main": roles["main"]}, tuning=replace(TUNING, steps=0), seed=0)
    expected = torch.get_rng_state()
    edit.apply(edited)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(parameter.grad is None for parameter in edited.network.parameters())
    assert not edited.network.training


# What repairs a tuned model


def repaired(
    tuned: ChatModel, trainable: Trainable, roles: Roles, methods: list[PostDefense], measured: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The weights after three steps of supervised fine-tuning and the repairs; `measured` are those at 0, 2 and 3."""
    folder = Path(Unaligned.folder).parent  # any other weights will do for an artifact
    tune(
        tuned,
        Method(),
        roles=roles,
        tuning=replace(TUNING, trainable=trainable, steps=3),
        seed=0,
        repairs=[Repair(method=method, artifacts=dict.fromkeys(method.artifacts, folder)) for method in methods],
        measure=lambda step, spent: measured.append(parameters(tuned)),
        measured_steps=(0, 2, 3),
    )
    return parameters(tuned)


@EACH_REPAIR
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neutral_repair_changes_no_bit(
    post: Post, trainable: Trainable, dtype: torch.dtype, chat: MakeChat, roles: Roles
) -> None:
    if post.neutral is None:
        pytest.skip("changes weights at every setting")
    found, expected = chat(dropout=0.3), chat(dropout=0.3)
    for tuned in (found, expected):
        tuned.network.to(dtype)
    after = repaired(found, trainable, roles, [post.method(**post.neutral)], [])
    plain = repaired(expected, trainable, roles, [], [])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in after.items())


@EACH_REPAIR
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repair_is_of_what_was_tuned_and_the_same_each_time(
    post: Post, trainable: Trainable, dtype: torch.dtype, chat: MakeChat, roles: Roles
) -> None:
    """What was measured after the last step is what stays, and neither measuring nor the random state has a say."""
    found, again, plain = chat(), chat(), chat()
    for tuned in (found, again, plain):
        tuned.network.to(dtype)
    measured: list[dict[str, Tensor]] = []
    after = repaired(found, trainable, roles, [post.method()], measured)
    torch.rand(3)
    same, without = repaired(again, trainable, roles, [post.method()], []), repaired(plain, trainable, roles, [], [])
    assert len(measured) == 3
    for name, tensor in after.items():
        assert tensor.dtype is without[name].dtype and tensor.isfinite().all()
        assert torch.equal(tensor, measured[-1][name]) and torch.equal(tensor, same[name])
        assert tensor.ndim > 1 or torch.equal(tensor, without[name])
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, without[name])}
    assert len({name.split(".layers.")[1][0] for name in changed if ".layers." in name}) == LAYERS


@EACH_REPAIR
@BOTH
def test_repair_leaves_nothing_behind(post: Post, trainable: Trainable, chat: MakeChat, roles: Roles) -> None:
    """No `.grad`, no hook, no other mode or trainable set, no drawn random number."""

    @dataclass(frozen=True, kw_only=True)
    class Watched(PostDefense):
        inner: PostDefense
        met: list[int] = field(default_factory=list)

        @property
        def roles(self) -> tuple[str, ...]:
            return self.inner.roles

        @property
        def artifacts(self) -> Mapping[str, Any]:
            return self.inner.artifacts

        def setup(self, context: Context) -> None:
            before = self.state(context)
            self.inner.setup(context)
            self.compare(before, self.state(context))

        def finish(self, context: Context) -> None:
            before = self.state(context)
            self.inner.finish(context)
            self.compare(before, self.state(context))
            self.met.append(context.step)

        def state(self, context: Context) -> dict[str, Any]:
            network = context.network
            found = {f"grad of {name}": parameter.grad for name, parameter in network.named_parameters()}
            hooks = [
                hook
                for module in network.modules()
                for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            ]
            trainable = [parameter.requires_grad for parameter in network.parameters()]
            counts = torch.tensor([len(hooks), network.training, *trainable])
            copies = {name: None if grad is None else grad.clone() for name, grad in found.items()}
            return {"random": torch.get_rng_state(), "counts": counts, **copies}

        def compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
            assert before.keys() == now.keys()
            for name, item in before.items():
                assert item is now[name] is None or torch.equal(item, now[name]), name

    watched = Watched(inner=post.method())
    repaired(chat(), trainable, roles, [watched], [])
    assert len(watched.met) == 4


@EACH_REPAIR
def test_a_missing_role_of_a_repair_is_named(post: Post, chat: MakeChat, roles: Roles) -> None:
    method = post.method()
    assert method.stage == "post"
    for missing in method.roles:
        given = {role: roles[role] for role in ("main", *method.roles) if role != missing}
        with pytest.raises(ValueError, match=f"needs the data roles {missing}, which"):
            repaired(chat(), LORA, given, [method], [])


# What it asks for


@EACH
def test_a_missing_role_is_named_before_anything_is_done(case: Case, chat: MakeChat, roles: Roles) -> None:
    method = case.method()
    assert method.roles and method.passes > 0
    for missing in method.roles:
        given = {role: roles[role] for role in method.roles if role != missing}
        untouched = chat()
        with pytest.raises(ValueError, match=f"needs the data roles {missing}, which"):
            tune(untouched, method, roles=given, tuning=replace(TUNING, trainable=LORA), seed=0)
        assert not hasattr(untouched.network, "peft_config")


SHIPPED = pytest.mark.parametrize(
    "name", [name for name in config.choices("defense") if name not in ("none", "checkpoint")]
)


def shipped(name: str) -> Any:
    """Made from its file alone, whether or not the default threat model admits it."""
    plain: Any = OmegaConf.to_container(config.load([f"defense={name}"]), resolve=True)
    return instantiate(plain["defense"][name], object, key=f"defense.{name}")


def build(name: str, *overrides: str) -> config.Cell:
    return config.build(config.load([f"defense={name}", *overrides]))


@SHIPPED
def test_shipped_choice_is_in_the_tables_and_misses_its_data_when_built(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shipped is tested: the same class, under the name of its choice."""
    defense = shipped(name)
    assert type(defense) is (METHODS | EDITS | REPAIRS)[name].make
    threat = []
    if defense.stage != "alignment":
        threat = ["threat=finetuning_service"]
        with pytest.raises(ValueError, match=f"defense.{name}: acts at the {defense.stage} stage"):
            build(name)
    cell = build(name, *threat)
    if "retain" in defense.roles:
        with pytest.raises(ValueError, match=r"task.retain: the defense needs benign conversations"):
            build(name, "task=none", *threat)
    if {"refusals", "paired"} & set(defense.roles):
        pairs = validation.defense_examples(cell.data)
        unpaired = [replace(example, refusal=None) for example in pairs]
        monkeypatch.setattr(validation, "defense_examples", lambda data: unpaired)
        with pytest.raises(ValueError, match=f"defense.{name}: needs refusals, and {len(unpaired)} .* have none"):
            build(name, *threat)
