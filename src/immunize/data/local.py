"""A domain of one's own, from a local JSON, JSONL, CSV or Parquet file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from immunize.data.row_domain import RowDomain, normalized
from immunize.data.rows import MalformedError, Row, Rows, text
from immunize.types import Example


@dataclass(frozen=True, kw_only=True)
class LocalDomain(RowDomain):
    """Rows of prompt, answer (harmful), refusal and category; `object` defaults to the prompt.

    The fields ending in `_column` say how the file calls them. malformed_share: the share of rows that may lack one of
    these texts and are left out; above it, the file is refused. Known by its rows, so the file may be moved.
    """

    path: str
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    refusal_column: str = "refusal"
    category_column: str = "category"
    object_column: str | None = None
    malformed_share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.source  # a path that cannot be read is refused at once

    @cached_property
    def source(self) -> Rows:
        return Rows(path=self.path, malformed_share=self.malformed_share)

    def needed(self) -> set[str]:
        columns = {self.prompt_column, self.answer_column, self.refusal_column, self.category_column}
        return columns | ({self.object_column} if self.object_column else set())

    def hint(self) -> str:
        return "Name the right one with data.domain.<prompt|answer|refusal|category|object>_column"

    def maker(self, rows: Sequence[Row]) -> Callable[[Row], Example]:
        objects: dict[str, str] = {}

        def example(row: Row) -> Example:
            prompt = text(row, self.prompt_column)
            about = text(row, self.object_column) if self.object_column else normalized(prompt)
            if objects.setdefault(normalized(prompt), about) != about:
                raise MalformedError(f"has another {self.object_column} than an earlier row of the same prompt")
            return Example(
                id=f"{self.name}/{row.number}",
                prompt=prompt,
                answer=text(row, self.answer_column),
                refusal=text(row, self.refusal_column),
                category=text(row, self.category_column),
                object=about,
            )

        return example
