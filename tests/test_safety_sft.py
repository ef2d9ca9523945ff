"""Safety SFT, the control: plain tuning on refusals, of which the answers alone are learned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from immunize.data.batches import IGNORED, Batch
from immunize.defenses.safety_sft import SafetySFT
from immunize.models.loading import ChatModel
from immunize.training.context import Context
from immunize.training.method import Method
from immunize.training.tune import tune
from immunize.training.tuning import Tuning

TUNING = Tuning(learning_rate=0.01, steps=4, batch_size=4)
MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]


@dataclass(frozen=True, kw_only=True)
class PlainOnRefusals(Method):
    needs: ClassVar[tuple[str, ...]] = ("refusals",)


@pytest.fixture
def context(make_chat: MakeChat, make_context: MakeContext) -> Context:
    return make_context(make_chat())


def test_without_retain_it_is_plain_tuning_to_the_bit(make_chat: MakeChat, roles: dict[str, Any]) -> None:
    """And needs no retain data."""
    without = {"refusals": roles["refusals"]}
    chats = []
    for method in (SafetySFT(tuning=TUNING, retain_weight=0.0), PlainOnRefusals()):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=without, tuning=TUNING, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="SafetySFT needs the data roles retain"):
        tune(make_chat(), SafetySFT(tuning=TUNING), roles=without, tuning=TUNING, seed=0)


def test_answers_alone_are_learned(context: Context, roles: dict[str, Any]) -> None:
    """Row by row and token by token: no prompt token is predicted, and padding changes nothing."""
    batch: Any = context.draw("refusals")
    examples = [roles["refusals"][index] for index in context.streams["refusals"].indices(0)]
    losses = []
    for item in examples:
        log_p = context.network(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
        losses += [-log_p[column - 1, item.ids[column]] for column in range(item.answer_start, len(item.ids))]
    expected = (sum(losses) / len(losses)).item()  # type: ignore[union-attr]
    method = SafetySFT(tuning=TUNING, retain_weight=0.0)
    assert method.step(context, batch).loss.item() == pytest.approx(expected, rel=1e-5)
    padded = Batch(
        input_ids=F.pad(batch.input_ids, (0, 4), value=7),
        labels=F.pad(batch.labels, (0, 4), value=IGNORED),
        attention_mask=F.pad(batch.attention_mask, (0, 4)),
    )
    assert method.step(context, padded).loss.item() == pytest.approx(expected, rel=1e-5)


def test_label_before_the_first_token_changes_nothing(context: Context) -> None:
    """No position predicts it; and a further label inside the prompt would change the loss."""
    batch: Any = context.draw("refusals")
    method = SafetySFT(tuning=TUNING, retain_weight=0.0)
    expected = method.step(context, batch).loss.item()
    for column, same in ((0, True), (1, False)):
        labels = batch.labels.clone()
        labels[:, column] = batch.input_ids[:, column]
        changed = Batch(input_ids=batch.input_ids, labels=labels, attention_mask=batch.attention_mask)
        assert (method.step(context, changed).loss.item() == expected) is same


def test_retain_loss_is_weighted_and_drawn_anew_each_step(context: Context) -> None:
    method = SafetySFT(tuning=TUNING, retain_weight=0.3)
    for number in range(3):
        batch: Any = context.draw("refusals")
        benign = context.ce(context.streams["retain"].batch(number)).item()
        expected = context.ce(batch).item() + 0.3 * benign
        assert method.step(context, batch).loss.item() == pytest.approx(expected, rel=1e-6)


def test_negative_retain_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"retain_weight=-1\.0"):
        SafetySFT(tuning=TUNING, retain_weight=-1.0)
