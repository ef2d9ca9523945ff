"""Adversarial loss: each form is its formula, unlearns harmful answers, and is plain tuning at weight zero."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from immunize.data.batches import IGNORED, Batch, PairedBatch
from immunize.defenses.adversarial_loss import AdversarialLoss
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.method import Method, StepOut
from immunize.training.tune import tune
from immunize.training.tuning import Optimizer, Tuning

FORMS: Any = ("linear", "log", "bounded")
TUNING = Tuning(learning_rate=0.01, steps=3, batch_size=4, optimizer=Optimizer(name="sgd", clip=None))
MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


@pytest.fixture
def batch(context: Context) -> PairedBatch:
    return context.draw("paired")


def answer_log_probabilities(context: Context, batch: Batch) -> list[float]:
    """One answer token after the other, in float64."""
    with torch.no_grad():
        logits: Tensor = context.network(input_ids=batch.input_ids).logits.double()
    return [
        logits[row, column - 1].log_softmax(-1)[batch.labels[row, column]].item()
        for row, column in (batch.labels != IGNORED).nonzero().tolist()
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_each_form_is_its_formula(form: Any, weight: float, context: Context, batch: PairedBatch) -> None:
    refusals = -mean(answer_log_probabilities(context, batch.refusal))
    harmful = answer_log_probabilities(context, batch.harmful)
    term = {
        "linear": mean(harmful),
        "log": -math.log(1 - mean(harmful)),
        "bounded": mean([-math.log1p(-math.exp(log_p)) for log_p in harmful if log_p > -15]),
    }[form]
    loss = AdversarialLoss(tuning=TUNING, weight=weight, form=form).step(context, batch).loss
    assert loss.item() == pytest.approx(refusals + weight * term, rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class OnRefusals(Method):
    """Plain fine-tuning on the refusals of the pairs."""

    needs: ClassVar[tuple[str, ...]] = ("paired",)

    def step(self, context: Context, batch: Any) -> StepOut:
        return StepOut(loss=context.ce(batch.refusal))


@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_is_plain_tuning_to_the_bit(form: Any, make_chat: MakeChat, roles: dict[str, Any]) -> None:
    chats = []
    for method in (AdversarialLoss(tuning=TUNING, weight=0.0, form=form), OnRefusals()):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_raises_the_harmful_loss(form: Any, context: Context, batch: PairedBatch) -> None:
    """With a large weight; along the opposite direction it falls."""
    gradient = context.grad(AdversarialLoss(tuning=TUNING, weight=100.0, form=form).step(context, batch).loss)
    before = -mean(answer_log_probabilities(context, batch.harmful))
    norm = torch.stack([grad.norm() for grad in gradient.values()]).norm()
    for sign in (1, -1):
        with context.at({name: -sign * 0.01 * grad / norm for name, grad in gradient.items()}):
            after = -mean(answer_log_probabilities(context, batch.harmful))
        assert sign * (after - before) > 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_bounded_form_never_falls_below_the_loss_of_refusals(
    scale: float, context: Context, batch: PairedBatch
) -> None:
    """Whatever the model predicts; the linear form does."""
    with torch.no_grad():
        context.network.lm_head.weight.mul_(scale)
    refusals = -mean(answer_log_probabilities(context, batch.refusal))
    losses = {
        form: AdversarialLoss(tuning=TUNING, weight=10.0, form=form).step(context, batch).loss.item() for form in FORMS
    }
    assert losses["bounded"] >= refusals - 1e-4
    assert losses["linear"] < losses["log"] < losses["bounded"]


def test_log_form_is_finite_where_harmful_answers_are_certain(context: Context, batch: PairedBatch) -> None:
    """log(1 + h) at h = 0, where Booster's log h is minus infinity."""
    silent = Batch(
        input_ids=batch.harmful.input_ids,
        labels=torch.full_like(batch.harmful.labels, IGNORED),
        attention_mask=batch.harmful.attention_mask,
    )
    pair = PairedBatch(harmful=silent, refusal=batch.refusal)
    for form in FORMS:
        loss = AdversarialLoss(tuning=TUNING, weight=5.0, form=form).step(context, pair).loss
        assert loss.item() == pytest.approx(context.ce(batch.refusal).item())
        assert all(grad.isfinite().all() for grad in context.grad(loss).values())


def test_retain_loss_is_added_in_every_form(context: Context, batch: PairedBatch) -> None:
    for number, form in enumerate(FORMS):
        plain = AdversarialLoss(tuning=TUNING, form=form).step(context, batch).loss.item()
        benign = context.ce(context.streams["retain"].batch(number)).item()
        method = AdversarialLoss(tuning=TUNING, form=form, retain_weight=2.0)
        assert method.step(context, batch).loss.item() == pytest.approx(plain + 2 * benign, rel=1e-6)


def test_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=-0\.1.*unlearned, not learned"):
        AdversarialLoss(tuning=TUNING, weight=-0.1)
