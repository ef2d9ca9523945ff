"""Answers to evaluation prompts, and the loss of the reference answers, at any point of a tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from immunize.data.answers import Answers, Cost
from immunize.data.batches import Encoded, pad
from immunize.models.chat import encode
from immunize.models.generation import answer
from immunize.models.loading import ChatModel
from immunize.models.predictions import predict
from immunize.models.sources import ModelSource
from immunize.training.budget import Spent
from immunize.training.losses import mean_loss_per_row
from immunize.types import Example, Generation


@dataclass(kw_only=True)
class Meter:
    """Collects the generations of one stage. `source` says how answers are generated."""

    chat: ChatModel
    source: ModelSource
    generations: list[Generation] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    def measure(self, step: int, spent: Spent | None, sets: Mapping[str, Sequence[Example]]) -> None:
        """Let the model answer every set. The caller sees to eval mode and to the random state."""
        for name, examples in sets.items():
            texts = answer(
                self.chat,
                [example.prompt for example in examples],
                max_new_tokens=self.source.max_new_tokens,
                batch_size=self.source.generation_batch,
            )
            losses = reference_losses(self.chat, examples, batch_size=self.source.generation_batch)
            self.generations.append(Generation(measured_on=name, step=step, texts=tuple(texts), losses=tuple(losses)))
        if spent is None:
            self.costs.append(Cost(step=step))
        else:
            self.costs.append(Cost(step=step, examples=spent.examples, tokens=spent.tokens, flops=spent.flops))

    def state(self) -> dict[str, Any]:
        """What was measured so far, as plain values."""
        return {
            "generations": [asdict(generation) for generation in self.generations],
            "costs": [asdict(cost) for cost in self.costs],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.generations = [
            Generation(**{**kept, "texts": tuple(kept["texts"]), "losses": tuple(kept["losses"])})
            for kept in state["generations"]
        ]
        self.costs = [Cost(**kept) for kept in state["costs"]]

    def answers(self) -> Answers:
        return Answers(generations=self.generations, costs=self.costs)


def reference_losses(chat: ChatModel, examples: Sequence[Example], *, batch_size: int) -> list[float]:
    """Token-mean loss of each example's reference answer (nats)."""
    encoded = encode(chat, [(example.prompt, example.answer) for example in examples])
    return answer_losses(chat, encoded, batch_size=batch_size)


@torch.no_grad()
def answer_losses(chat: ChatModel, encoded: Sequence[Encoded], *, batch_size: int) -> list[float]:
    """Token-mean loss of what each row has from its `answer_start` on (nats)."""
    losses = []
    for start in range(0, len(encoded), batch_size):
        batch = pad(encoded[start : start + batch_size], pad_id=chat.pad_id).to(chat.device)
        losses += mean_loss_per_row(predict(chat.network, batch.input_ids, batch.labels)).tolist()
    return losses
