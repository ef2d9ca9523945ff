"""From examples to padded batches whose order is a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from immunize.seeding import derive

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one prompt with its answer; the answer (with its end token) starts at `answer_start`."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer_start

    @property
    def labelled(self) -> int:
        """Tokens of the answer that a token before them predicts."""
        return len(self.ids) - max(1, self.answer_start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Right-padded conversations. `labels` is `IGNORED` on prompt and padding, by position and never by token id.

    `share`, for a micro-batch: the token mean of the whole batch is the average of share x token mean over its
    micro-batches. It is 1 where their answers are equally long.
    """

    input_ids: Tensor  # (batch, time)
    labels: Tensor  # (batch, time)
    attention_mask: Tensor  # (batch, time)
    share: float = 1.0

    @property
    def examples(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens without padding, prompts included."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            attention_mask=self.attention_mask.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedBatch:
    """Harmful answers and refusals to the *same* prompts, padded jointly so that positions correspond."""

    harmful: Batch
    refusal: Batch

    @property
    def examples(self) -> int:
        return self.harmful.examples + self.refusal.examples

    @property
    def tokens(self) -> int:
        return self.harmful.tokens + self.refusal.tokens

    @property
    def differs(self) -> Tensor:
        """(batch, time), true where the two sequences differ; padding against padding does not."""
        real = self.harmful.attention_mask.bool() | self.refusal.attention_mask.bool()
        unequal_ids = self.harmful.input_ids != self.refusal.input_ids
        unequal_length = self.harmful.attention_mask != self.refusal.attention_mask
        return real & (unequal_ids | unequal_length)

    def to(self, device: torch.device) -> "PairedBatch":
        return PairedBatch(harmful=self.harmful.to(device), refusal=self.refusal.to(device))


def pad(encoded: Sequence[Encoded], *, pad_id: int, length: int | None = None) -> Batch:
    """Pad to the longest (or to `length`) on the right."""
    width = length or max(len(item.ids) for item in encoded)
    ids, labels, mask = [], [], []
    for item in encoded:
        padding = width - len(item.ids)
        ids.append([*item.ids, *[pad_id] * padding])
        labels.append([*[IGNORED] * item.answer_start, *item.ids[item.answer_start :], *[IGNORED] * padding])
        mask.append([1] * len(item.ids) + [0] * padding)
    return Batch(input_ids=torch.tensor(ids), labels=torch.tensor(labels), attention_mask=torch.tensor(mask))


def pad_pair(harmful: Sequence[Encoded], refusal: Sequence[Encoded], *, pad_id: int) -> PairedBatch:
    """Pad both sides to one common length."""
    width = max(len(item.ids) for item in (*harmful, *refusal))
    return PairedBatch(
        harmful=pad(harmful, pad_id=pad_id, length=width), refusal=pad(refusal, pad_id=pad_id, length=width)
    )


def join(first: Batch, second: Batch, *, pad_id: int) -> Batch:
    """The rows of both, those of `first` first, padded to the wider."""
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def rows(name: str, value: int) -> Tensor:
        sides = [getattr(batch, name) for batch in (first, second)]
        return torch.cat([F.pad(side, (0, width - side.shape[1]), value=value) for side in sides])

    return Batch(
        input_ids=rows("input_ids", pad_id),
        labels=rows("labels", IGNORED),
        attention_mask=rows("attention_mask", 0),
    )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """An endless sequence of micro-batches over one role's examples: shuffled epochs, one after the other.

    `pairs` holds the paired refusals, in the order of `examples`, where the role is paired. `micro_batches` of them in
    a row make a batch of `batch_size` rows. Of `world_size` processes, each takes every so many of them, from its
    `rank` on; all together see what one process would.
    """

    name: str
    examples: Sequence[Encoded]
    pairs: Sequence[Encoded] | None = None
    batch_size: int
    pad_id: int
    seed: int
    micro_batches: int = 1
    rank: int = 0
    world_size: int = 1

    def indices(self, number: int) -> list[int]:
        """Which examples micro-batch `number` of this process holds; a pure function of (seed, name, number).

        A batch is dealt out by length: a micro-batch holds little padding, and processes are done at the same time.
        """
        return self._dealt(number * self.world_size + self.rank)

    def batch(self, number: int) -> Batch | PairedBatch:
        chosen = self.indices(number)
        padded = self._padded(chosen)
        if isinstance(padded, PairedBatch):
            return padded
        return replace(padded, share=self._share(number, [self.examples[index] for index in chosen]))

    def size(self, number: int) -> tuple[int, int]:
        """Examples and tokens (without padding) of all processes' micro-batches `number`; both sides of pairs."""
        sides = [self.examples] if self.pairs is None else [self.examples, self.pairs]
        chosen = [index for rank in range(self.world_size) for index in self._dealt(number * self.world_size + rank)]
        return len(sides) * len(chosen), sum(len(side[index].ids) for side in sides for index in chosen)

    def rows(self, start: int, count: int) -> Batch | PairedBatch:
        """`count` examples of the same sequence, whatever the batch size, after the `start` that each process had."""
        return self._padded(self._at(start * self.world_size + self.rank * count, count))

    def _at(self, start: int, rows: int) -> list[int]:
        count = len(self.examples)
        positions = range(start, start + rows)
        orders = {
            epoch: np.random.default_rng(derive(self.seed, "order", self.name, epoch)).permutation(count)
            for epoch in {position // count for position in positions}
        }
        return [int(orders[position // count][position % count]) for position in positions]

    def _dealt(self, place: int) -> list[int]:
        """Which examples a micro-batch holds, by its place among those of all processes."""
        batch, part = divmod(place, self.micro_batches)
        chosen = self._at(batch * self.batch_size, self.batch_size)
        if self.micro_batches > 1:
            chosen.sort(key=self._length)
        rows = self.batch_size // self.micro_batches
        return chosen[part * rows : (part + 1) * rows]

    def _length(self, index: int) -> int:
        sides = (self.examples,) if self.pairs is None else (self.examples, self.pairs)
        return max(len(side[index].ids) for side in sides)

    def _padded(self, chosen: Sequence[int]) -> Batch | PairedBatch:
        examples = [self.examples[index] for index in chosen]
        if self.pairs is None:
            return pad(examples, pad_id=self.pad_id)
        return pad_pair(examples, [self.pairs[index] for index in chosen], pad_id=self.pad_id)

    def _share(self, number: int, examples: Sequence[Encoded]) -> float:
        if self.micro_batches == 1:
            return 1.0
        batch = (number * self.world_size + self.rank) // self.micro_batches
        whole = sum(self.examples[index].labelled for index in self._at(batch * self.batch_size, self.batch_size))
        return self.micro_batches * sum(item.labelled for item in examples) / max(1, whole)


class FixedBatches(torch.utils.data.Dataset):
    """The first `steps` micro-batches of a stream, one an item, for a loader with `batch_size=None`."""

    def __init__(self, stream: Stream, *, steps: int) -> None:
        self.stream = stream
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Batch | PairedBatch:
        return self.stream.batch(number)
