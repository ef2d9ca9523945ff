"""How a tuning goes, whatever is tuned for: trainable set, optimizer, schedule, number of steps. No torch."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from immunize.stages import UNLESS_NONE


@dataclass(frozen=True, kw_only=True)
class FullParameter:
    """All weights are trained."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters are trained, the weights below them are frozen.

    adapter: `fresh` folds an earlier adapter into the weights and starts a new one at zero; `continued` goes on with
    the adapter of the defense, as it is (rank, alpha, dropout and targets are that adapter's own). They are different
    attacks. The control has no earlier adapter and always starts fresh.

    quantized: `nf4` rounds the linear layers below the adapter to 4 bits (QLoRA, Dettmers et al., NeurIPS 2023), which
    takes a GPU and bitsandbytes. What is measured is the model with these layers.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    adapter: Literal["fresh", "continued"] = "fresh"
    quantized: Literal["nf4"] | None = field(default=None, metadata=UNLESS_NONE)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: must be more than 0, or the adapter would add nothing")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie in [0, 1)")
        if not self.targets:
            raise ValueError("targets: name at least one module, or choose all-linear")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(f"targets={self.targets}: is no regular expression ({error})") from error
        if self.quantized is not None and self.adapter == "continued":
            raise ValueError("quantized=nf4: an adapter cannot be taken out of rounded weights; choose adapter=fresh")


Trainable = FullParameter | LoRA


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """warmup: share of the steps over which the rate rises linearly; clip: gradient norm, null for none.

    adamw_8bit keeps its two moments in 8 bits; it takes a GPU and bitsandbytes.
    """

    name: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: must not be negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must lie in [0, 1)")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum={self.momentum}: only name=sgd has momentum; adamw has its own")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup}: is a share of the steps and must lie in [0, 1]")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip}: must be positive, or null for no clipping")

    def rate_factor(self, step: int, *, steps: int) -> float:
        """What the learning rate is multiplied by at optimizer step `step` (from 0) of `steps`."""
        warmup_steps = math.ceil(self.warmup * steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        if self.schedule == "linear":
            return 1 - progress
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One tuning: `steps` optimizer steps over batches of `batch_size` examples.

    micro_batch: rows of one forward pass, whose gradients are accumulated; None is the whole batch. It saves memory,
    and time where lengths are mixed: a batch's rows are dealt out by length, and so are padded less.
    Plain supervised fine-tuning stays what it is but for rounding: every token counts alike in the whole batch. Every
    other method is applied to each micro-batch, as if it were the batch, and the gradients are averaged, which is
    another objective where it is not linear in the examples (a norm, a logarithm, a mean over tokens). Micro-batches
    have dropout masks of their own, and share what `Context.normal_like` draws. All this holds of the parts of a batch
    that several processes take (runtime=ddp), too.
    """

    learning_rate: float
    steps: int
    batch_size: int
    micro_batch: int | None = field(default=None, metadata=UNLESS_NONE)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainable: Trainable = field(default_factory=FullParameter)

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must not be negative")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must not be negative")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            possible = [rows for rows in range(1, self.batch_size + 1) if self.batch_size % rows == 0]
            raise ValueError(
                f"micro_batch={self.micro_batch}: must divide batch_size={self.batch_size}, so one of "
                f"{', '.join(map(str, possible))}; or null for the whole batch"
            )

    @property
    def micro_batches(self) -> int:
        """How many of them make a batch."""
        return self.batch_size // (self.micro_batch or self.batch_size)

    def shared_micro_batches(self, processes: int) -> int:
        """How many micro-batches make a batch that `processes` share; without `micro_batch`, one for each.

        Raises ValueError where they cannot have equally many.
        """
        count = self.micro_batches if self.micro_batch else processes
        if count % processes or self.batch_size % count:
            raise ValueError(
                f"batch_size={self.batch_size}, micro_batch={self.micro_batch}: {processes} processes must have "
                "equally many micro-batches of each batch, all of one size"
            )
        return count
