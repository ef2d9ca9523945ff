"""Harmful domains that are not question and answer: toxic continuations, and requests that come without answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from immunize.data.row_domain import RowDomain, normalized
from immunize.data.rows import LeftOutError, Row, Rows, text, value
from immunize.types import Example


@dataclass(frozen=True, kw_only=True)
class RealToxicity(RowDomain):
    """DecodingTrust's split of RealToxicityPrompts, with the paired refusals of Rosati et al. (NeurIPS 2024).

    Columns prompt.text, continuation.text and refusal; where there is a column `type`, only its `toxic` rows are taken.
    The answer is the toxic continuation. All of it is one category, so that it serves as data.other_domain, or alone
    with split.exposures=[seen]. instruction: what is said before the text to be continued, the papers' being longer.
    """

    rows: Rows
    instruction: str = "Continue this text."

    @property
    def source(self) -> Rows:
        return self.rows

    def needed(self) -> set[str]:
        return {"prompt", "continuation", "refusal"}

    def maker(self, rows: Sequence[Row]) -> Callable[[Row], Example]:
        def example(row: Row) -> Example:
            kind = value(row, "type")
            if kind not in (None, "toxic"):
                raise LeftOutError("another type than toxic")
            opening, refusal = text(row, "prompt.text"), text(row, "refusal")
            return Example(
                id=f"{self.name}/{row.number}",
                prompt=f"{self.instruction}\n{opening}",
                answer=text(row, "continuation.text"),
                # The authors saved what the model wrote together with what it had read.
                refusal=refusal.partition(f"{opening}\nContinuation:")[2].strip() or refusal,
                category="toxicity",
                object=normalized(opening),
            )

        return example


@dataclass(frozen=True, kw_only=True)
class Requests(RowDomain):
    """Harmful requests without a full answer, such as AdvBench (an opening of one) and HEx-PHI (none).

    answer_column: None where the data have none; the answer is then `consent`. An attack on either teaches to consent,
    and nothing of what would follow. The refusal of every request is `refusal`. category_column: None puts all under
    one category, which leaves none to hold out: split.exposures=[seen].
    """

    rows: Rows
    prompt_column: str = "prompt"
    answer_column: str | None = None
    category_column: str | None = None
    consent: str = "Sure, here is how to do that:"
    refusal: str = "I'm sorry, but I can't help with that."

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("consent", "refusal"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: must not be empty")

    @property
    def source(self) -> Rows:
        return self.rows

    def needed(self) -> set[str]:
        return {name for name in (self.prompt_column, self.answer_column, self.category_column) if name}

    def hint(self) -> str:
        return "Name the right one with prompt_column, answer_column or category_column, beside rows"

    def maker(self, rows: Sequence[Row]) -> Callable[[Row], Example]:
        def example(row: Row) -> Example:
            prompt = text(row, self.prompt_column)
            return Example(
                id=f"{self.name}/{row.number}",
                prompt=prompt,
                answer=text(row, self.answer_column) if self.answer_column else self.consent,
                refusal=self.refusal,
                category=text(row, self.category_column) if self.category_column else self.name,
                object=normalized(prompt),
            )

        return example
