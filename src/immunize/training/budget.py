"""What the attacker may spend, and the count of what was spent."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one attack may cost: `samples` examples, `epochs` times over, in batches, at one learning rate.

    measurements: how often the attacked model is measured on the way, the last step included and step 0 not counted.
    """

    version: ClassVar[int] = 1
    learning_rate: float
    samples: int
    epochs: int = 1
    batch_size: int = 16
    measurements: int = 15

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must not be negative")
        for name in ("samples", "epochs", "batch_size", "measurements"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 1:
            raise ValueError(
                f"batch_size={self.batch_size}: larger than samples x epochs = {self.samples * self.epochs}, "
                "so that no step would be taken"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps; a last incomplete batch is not trained on."""
        return self.samples * self.epochs // self.batch_size


def measured_steps(steps: int, *, measurements: int) -> list[int]:
    """0, k, 2k, ... and the last step, with k the smallest interval that needs no more than `measurements`."""
    interval = -(-steps // measurements) if steps else 1
    return sorted({*range(0, steps + 1, interval), steps})


@dataclass(kw_only=True)
class Spent:
    """Counted while tuning, for all processes that share it. Tokens are without padding, prompts included."""

    parameters: int
    steps: int = 0
    examples: int = 0
    tokens: int = 0

    def add(self, *, examples: int, tokens: int) -> None:
        self.examples += examples
        self.tokens += tokens

    @property
    def flops(self) -> float:
        """An estimate: 6 x parameters x tokens, that of full-parameter supervised fine-tuning."""
        return 6.0 * self.parameters * self.tokens
