"""A domain of one's own, from a local JSON, JSONL, CSV or Parquet file."""

import hashlib
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from immunize.stages import canonical_json
from immunize.types import Example

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class LocalDomain:
    """Rows of prompt, answer (harmful), refusal and category; `object` defaults to the prompt.

    The fields ending in `_column` say how the file calls them. Known by its rows, so the file may be moved.
    """

    version: ClassVar[int] = 1
    path: str
    name: str
    evaluation_share: float = 0.5
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    refusal_column: str = "refusal"
    category_column: str = "category"
    object_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.evaluation_share < 1:
            raise ValueError(f"evaluation_share={self.evaluation_share}: must lie strictly between 0 and 1")
        if not Path(self.path).is_file():
            raise ValueError(f"path={self.path}: no such file")
        if Path(self.path).suffix not in READERS:
            raise ValueError(f"path={self.path}: must end in {', '.join(READERS)}")

    def examples(self) -> list[Example]:
        """One example a row, in the order of the file."""
        return list(self._examples)

    @cached_property
    def _examples(self) -> list[Example]:
        columns = {
            "prompt": self.prompt_column,
            "answer": self.answer_column,
            "refusal": self.refusal_column,
            "category": self.category_column,
            "object": self.object_column or self.prompt_column,
        }
        examples = []
        for number, row in enumerate(self._rows(set(columns.values()))):
            values = {name: row[column] for name, column in columns.items()}
            bad = [columns[name] for name, value in values.items() if not isinstance(value, str) or not value.strip()]
            if bad:
                raise ValueError(f"path={self.path}: row {number + 1} has no text in column {', '.join(bad)}")
            examples.append(Example(id=f"{self.name}/{number}", **values))
        return examples

    def _rows(self, needed: set[str]) -> list[dict[str, Any]]:
        from datasets import disable_progress_bars, load_dataset
        from datasets.exceptions import DatasetGenerationError

        disable_progress_bars()
        # A cache of its own: the library's fingerprints miss a change of content under an old time stamp.
        with tempfile.TemporaryDirectory() as cache:
            try:
                table = load_dataset(
                    READERS[Path(self.path).suffix],
                    data_files=self.path,
                    split="train",
                    cache_dir=cache,
                    keep_in_memory=True,
                )
            except DatasetGenerationError as error:
                raise ValueError(f"path={self.path}: cannot be read ({error.__cause__ or error})") from error
            missing = sorted(needed - set(table.column_names))
            if missing:
                raise ValueError(
                    f"path={self.path}: has no column {', '.join(missing)}; it has {', '.join(table.column_names)}. "
                    "Name the right one with data.domain.<prompt|answer|refusal|category|object>_column"
                )
            return table.to_list()

    def identity(self) -> dict[str, Any]:
        rows = canonical_json(self.examples())
        return {
            "class": type(self).__name__,
            "version": self.version,
            "name": self.name,
            "rows": hashlib.sha256(rows.encode()).hexdigest(),
            "evaluation_share": self.evaluation_share,
        }
