"""When memory does not suffice: what was being done, how large it is, and what to lower."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from immunize.models.loading import ChatModel
from immunize.models.sources import ModelSource
from immunize.training.tuning import FullParameter, Tuning

PHRASES = ("out of memory", "not enough memory", "can't allocate memory")


class OutOfMemoryError(RuntimeError):
    """Names the stage, the sizes, and what to lower."""


@dataclass(kw_only=True)
class Sizes:
    """What a stage works on, as far as it is known when memory ends."""

    stage: str
    source: ModelSource
    tuning: Tuning | None = None
    processes: int = 1
    chat: ChatModel | None = None
    roles: Mapping[str, Any] | None = None

    def sentence(self) -> str:
        model = f"{self.source.name} in {self.source.dtype}"
        parts = [model if self.chat is None else f"{model}, {self.chat.parameters:,} parameters"]
        if self.tuning is not None and self.tuning.steps:
            rows = self.tuning.batch_size // self.tuning.shared_micro_batches(self.processes)
            longest = max((len(item.ids) for item in _examples(self.roles or {})), default=0)
            parts.append(f"{type(self.tuning.trainable).__name__} tuning")
            parts.append(f"batch_size={self.tuning.batch_size}, of which {rows} rows at once")
            parts += [f"up to {longest} tokens a row"] if longest else []
        parts.append(f"generation_batch={self.source.generation_batch}")
        return ", ".join(parts)

    def advice(self) -> str:
        found = []
        if self.tuning is not None and self.tuning.steps:
            found += ["micro_batch (or batch_size)", "runtime.gradient_checkpointing=true"]
            if isinstance(self.tuning.trainable, FullParameter):
                found.append("a trainable set of LoRA")
        found.append("model.generation_batch")
        if self.source.dtype == "float32":
            found.append("model.dtype=bfloat16")
        return ", ".join(found)


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a stage that scores works on: the judges, and the `base` by which broken answers are recognized."""

    stage: str
    judges: Sequence[Any]
    base: ModelSource | None = None

    def sentence(self) -> str:
        parts = [f"{judge.name}, batch_size={judge.batch_size}" for judge in self._batched()]
        parts += [] if self.base is None else [f"{self.base.name} in {self.base.dtype}"]
        return "; ".join(parts) or "no model"

    def advice(self) -> str:
        found = [f"batch_size of judge {judge.name} (or its model.dtype)" for judge in self._batched()]
        found += [] if self.base is None else ["model.base.dtype (or model.base=null)"]
        return ", ".join(found) or "what else runs on this machine"

    def _batched(self) -> list[Any]:
        return [judge for judge in self.judges if hasattr(judge, "batch_size")]


@contextmanager
def explained(sizes: Sizes | Judging) -> Iterator[None]:
    """Inside, the end of memory raises OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(phrase in text for phrase in PHRASES):
            raise
        message = f"out of memory in [{sizes.stage}]: {sizes.sentence()}; to lower: {sizes.advice()}"
        raise OutOfMemoryError(message) from error


def _examples(roles: Mapping[str, Any]) -> Iterator[Any]:
    for examples in roles.values():
        for side in examples if isinstance(examples, tuple) else (examples,):
            yield from side
