"""The state of a long tuning, left behind now and then, from which a killed one goes on as if nothing had happened."""

import math
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

NAME = "state.pt"


class Memory(Protocol):
    """What else has to be remembered: the answers measured so far."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """One file in `folder`, written anew when the last one is `minutes` old; a file that is only half there is no file.

    It holds what is no pure function of seed and step: trainable weights, the optimizer's state, how much every role
    has been drawn from, the method's own memory (`Context.state`: tensors, numbers, texts, and lists and mappings of
    them), what was spent, and `memory`. Batches, noise, adapters and what `setup` makes are found again.
    """

    folder: Path
    minutes: float
    memory: Memory | None = None

    def read_only(self) -> "Checkpoints":
        """The same for a process that goes on from them and never writes any."""
        return replace(self, minutes=math.inf, memory=None)

    def save(self, state: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f"{NAME}.writing"
        measured = {} if self.memory is None else self.memory.state()
        with temporary.open("wb") as handle:
            torch.save({**state, "measured": measured}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(self.folder / NAME)

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none."""
        path = self.folder / NAME
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            warnings.warn(f"{path}: cannot be read ({error}); the stage starts from its beginning", stacklevel=2)
            return None
        if self.memory is not None:
            self.memory.load_state(state["measured"])
        return state
