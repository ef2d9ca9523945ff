"""Constrained SFT: the weights are the formula's, their gradient that of its objective, and the start is plain."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.data.batches import Batch, pad
from immunize.defenses.constrained_sft import FLOOR, ConstrainedSFT, keys
from immunize.models.loading import ChatModel
from immunize.models.predictions import predict
from immunize.training.context import Context
from immunize.training.losses import log_probabilities
from immunize.training.method import Method, StepOut
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import LoRA, Optimizer, Tuning

MakeChat = Callable[..., ChatModel]
MakeContext = Callable[..., Context]
Roles = dict[str, Any]
TUNING = Tuning(learning_rate=0.05, steps=1, batch_size=4, optimizer=Optimizer(weight_decay=0.1))
FULL, LORA = TUNING.trainable, LoRA(rank=2)


def moved(context: Context, size: float = 0.02) -> None:
    """Away from where the tuning began."""
    with torch.no_grad():
        for name, parameter in context.params().items():
            parameter.add_(size * context.normal_like(parameter, name))


def test_weights_by_hand() -> None:
    """Two prompt tokens, then an answer of four, after which comes padding; the early tokens are two.

    Token 1 is log 3 likelier with beta 1: sigmoid = 3/4, weight 1/2. Token 2 is log 2 likelier with beta 2: the odds
    are 4, weight 2/5. Token 3 is log 3 less likely with beta 1/2, the odds being 1 / sqrt 3: weight 2 / (1 + 1 / sqrt
    3) = 1.268. Token 4 has not moved: 1.
    """
    method = ConstrainedSFT(first=1.0, early=2.0, late=0.5, early_tokens=2)
    gain = torch.tensor([[0.0, math.log(3), math.log(2), -math.log(3), 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, True, True, False]])
    found = method.token_weights(gain, mask)
    torch.testing.assert_close(found[mask], torch.tensor([0.5, 0.4, 2 / (1 + 3**-0.5), 1.0]))


def test_positions_count_the_tokens_of_each_answer() -> None:
    """From its own start, row by row; in the column before the first label nothing has been counted."""
    method = ConstrainedSFT(first=0.0, early=1.0, late=30.0, early_tokens=3)
    mask = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, True, False]])
    found = method.token_weights(torch.ones(2, 6), mask)
    early = 2 * (1 - torch.sigmoid(torch.tensor(1.0))).item()
    assert found[0][mask[0]].tolist() == pytest.approx([1.0, early, early, FLOOR])
    assert found[1][mask[1]].tolist() == pytest.approx([1.0, early, early, FLOOR, FLOOR])


def test_weight_is_one_where_nothing_moved_and_falls_with_the_gain() -> None:
    gain = torch.linspace(-5, 3, 81)[:, None]  # of answers of one token
    found = ConstrainedSFT(first=2.0).token_weights(gain, torch.ones(81, 1, dtype=torch.bool))[:, 0]
    assert ConstrainedSFT().token_weights(torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool)).unique() == 1
    assert (found.diff() < 0).all() and found.max() < 2


@pytest.mark.parametrize("trainable", [FULL, LORA], ids=["full", "lora"])
def test_gradient_is_that_of_the_papers_objective(
    trainable: Any, make_chat: MakeChat, make_context: MakeContext
) -> None:
    """By autograd through  -mean (2 / beta) log sigmoid(beta (log p - log p0)), away from the start."""
    method = ConstrainedSFT(first=0.5, early=2.0, late=0.1, early_tokens=3)
    chat = make_chat()
    prepare_trainable(chat, trainable, seed=0)
    context = make_context(chat)
    batch: Any = context.streams["main"].batch(0)
    before = log_probabilities(context.predict(batch)).detach()
    method.setup(context)
    moved(context)
    found_now = context.predict(batch)
    log_p, mask = log_probabilities(found_now), found_now.labelled
    terms: list[Tensor] = []
    for row in range(4):
        for index, column in enumerate(mask[row].nonzero().flatten().tolist()):
            beta = 0.5 if index == 0 else 2.0 if index < 3 else 0.1
            gain = log_p[row, column] - before[row, column]
            terms.append(-(2 / beta) * F.logsigmoid(beta * gain))
    expected = context.grad(torch.stack(terms).mean())
    found = context.grad(method.step(context, batch).loss)
    plain = context.grad(context.ce(batch))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert any((found[name] - plain[name]).abs().max() > 1e-2 * plain[name].abs().max() for name in found)


@pytest.mark.parametrize("trainable", [FULL, LORA], ids=["full", "lora"])
def test_first_step_is_that_of_fine_tuning_to_the_bit(trainable: Any, make_chat: MakeChat, roles: Roles) -> None:
    """And the second is not."""
    for steps, same in ((1, True), (2, False)):
        tuning, chats = replace(TUNING, steps=steps, trainable=trainable), []
        for method in (ConstrainedSFT(), Method()):
            chats.append(make_chat())
            tune(chats[-1], method, roles=roles, tuning=tuning, seed=0)
        pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) is same


def test_later_epochs_find_the_same_examples_in_other_batches(make_chat: MakeChat, make_context: MakeContext) -> None:
    """Ten examples in batches of four: those after the third are of other rows, and the weights do not move."""
    context = make_context(make_chat())
    method = ConstrainedSFT(early=50.0)
    method.setup(context)
    assert len(context.state.before) == 10
    for number in range(8):
        batch: Any = context.streams["main"].batch(number)
        expected = context.grad(context.ce(batch))
        for name, grad in context.grad(method.step(context, batch).loss).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_examples_are_told_apart_by_where_the_answer_starts(roles: Roles) -> None:
    item = roles["main"][0]
    batch = pad([item, replace(item, answer_start=item.answer_start + 1), roles["main"][1]], pad_id=0)
    assert len(set(keys(batch))) == 3
    wider = Batch(
        input_ids=F.pad(batch.input_ids, (0, 2), value=9),
        labels=F.pad(batch.labels, (0, 2), value=-100),
        attention_mask=F.pad(batch.attention_mask, (0, 2)),
    )
    assert keys(wider) == keys(batch)


@dataclass(frozen=True, kw_only=True)
class Counted(Method):
    """Another method; how often the network is run in its setup and its first step."""

    inner: Method
    runs: list[int]

    def setup(self, context: Context) -> None:
        context.network.register_forward_hook(lambda *call: self.runs.append(context.step))
        self.inner.setup(context)

    def step(self, context: Context, batch: Any) -> StepOut:
        return self.inner.step(context, batch)


def test_without_betas_it_is_fine_tuning_to_the_bit_and_asks_for_no_reference(
    make_chat: MakeChat, roles: Roles
) -> None:
    tuning, chats = replace(TUNING, steps=4), []
    for method in (ConstrainedSFT(first=0.0, early=0.0, late=0.0), Method()):
        chats.append(make_chat(dropout=0.3))
        tune(chats[-1], method, roles=roles, tuning=tuning, seed=0)
    pairs = zip(chats[0].network.parameters(), chats[1].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for method, expected in ((ConstrainedSFT(first=0.0, early=0.0, late=0.0), 1), (ConstrainedSFT(), 3 + 1)):
        counted = Counted(inner=method, runs=[])
        tune(make_chat(), counted, roles=roles, tuning=TUNING, seed=0)
        assert len(counted.runs) == expected


def test_early_tokens_move_less(make_chat: MakeChat, make_context: MakeContext, roles: Roles) -> None:
    """Held by a large beta, the first tokens gain less than under fine-tuning, while the others are learned."""

    def gain(method: Method) -> tuple[float, float]:
        chat, start = make_chat(), make_chat()
        tuning = Tuning(learning_rate=0.01, steps=20, batch_size=10)
        tune(chat, method, roles=roles, tuning=tuning, seed=0)
        batch: Any = make_context(chat, batch_size=10).streams["main"].batch(0)
        predictions = [predict(each.network, batch.input_ids, batch.labels) for each in (chat, start)]
        now, before = (log_probabilities(found).detach() for found in predictions)
        mask = predictions[0].labelled
        first = mask & (mask.cumsum(1) == 1)
        return (now - before)[first].mean().item(), (now - before)[mask & ~first].mean().item()

    held_first, held_rest = gain(ConstrainedSFT(first=20.0, early=0.0, late=0.0))
    plain_first, plain_rest = gain(Method())
    assert held_first < plain_first / 2
    assert held_rest > plain_rest * 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": -1.0}, "first=-1.0: must not be negative"),
        ({"early": -1.0}, "early=-1.0: must not be negative"),
        ({"late": -1.0}, "late=-1.0: must not be negative"),
        ({"early_tokens": 0}, "early_tokens=0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstrainedSFT(**changes)
