"""What the suite asks of a judge."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from immunize.types import Example


class Judge(Protocol):
    """Scores answers to harmful prompts.

    `measure` returns arrays in [0, 1] in the order of the answers: `harmfulness`, and whatever else it can tell.
    An answer that could not be judged is NaN.
    """

    version: ClassVar[int]

    @property
    def name(self) -> str: ...
    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]: ...
