"""What a defense is: a method with a stage and a tuning of its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from immunize.training.method import Method
from immunize.training.tuning import Tuning

Stage = Literal["alignment", "finetuning", "post"]


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """`stage` says when it acts: before release, inside the user's tuning, or after it."""

    stage: ClassVar[Stage]


@dataclass(frozen=True, kw_only=True)
class AlignmentDefense(Defense):
    """Tunes the model before release, on the defense's own data.

    The roles it may need: `refusals`, `harmful`, `paired` (both to the same prompt) and `retain` (benign).
    """

    stage: ClassVar[Stage] = "alignment"
    tuning: Tuning
