"""Perplexity on a text: the plainest sign that a model still knows its language."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar

from immunize.data.batches import Encoded
from immunize.data.benchmark import Measured, Report
from immunize.data.splits import evaluation_set
from immunize.models.loading import ChatModel
from immunize.stages import hash_file
from immunize.training.measuring import answer_losses
from immunize.types import Example, Kind

FEWEST = 2  # windows: of one alone, no interval can be said


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss of a text file (UTF-8), window by window; an item is a window, its score minus its loss.

    The text is cut into windows of `window` tokens, without overlap, and what is left at its end is not counted; at
    most `max_windows` from its beginning (None takes all). Each window is read by itself, after the token that begins
    a text where the tokenizer has one, else its first token is not predicted. The loss is the mean negative
    log-likelihood per predicted token, in nats; perplexity is its exponential. Its first tokens have little context,
    so that it lies above that of a window that slides, for both arms alike. No chat template is applied.
    """

    version: ClassVar[int] = 1
    path: str
    name: str = "perplexity"
    window: int = 256
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"path={self.path}: no such file; give a text file")
        if self.window < 2:
            raise ValueError(f"window={self.window}: must be at least 2 tokens")
        if self.max_windows is not None and self.max_windows < FEWEST:
            raise ValueError(f"max_windows={self.max_windows}: must be at least {FEWEST}, or null for all")

    @property
    def names(self) -> Sequence[str]:
        return (self.name,)

    def check(self) -> None:
        try:
            self._text()
        except UnicodeDecodeError as error:
            raise ValueError(f"path={self.path}: is no text in UTF-8 ({error.reason} at byte {error.start})") from error

    def identity(self) -> dict[str, Any]:
        """The file's content, wherever it lies."""
        named = {"class": f"{type(self).__module__}.{type(self).__qualname__}", "version": self.version}
        settings = {"name": self.name, "window": self.window, "max_windows": self.max_windows}
        return named | settings | {"text": hash_file(Path(self.path))}

    def measure(self, chat: ChatModel, *, batch_size: int) -> Report:
        begin = chat.tokenizer.bos_token_id
        head = () if begin is None else (begin,)
        longest = getattr(chat.network.config, "max_position_embeddings", None)
        if longest is not None and len(head) + self.window > longest:
            raise ValueError(
                f"benchmark {self.name}: window={self.window}: with {len(head)} token(s) before it, longer than the "
                f"{longest} that the model can read"
            )
        windows = self._windows(chat)
        encoded = [Encoded(ids=(*head, *window), answer_start=1) for window in windows]
        losses = answer_losses(chat, encoded, batch_size=batch_size)
        items = [
            Example(id=f"{self.name}/{number}", prompt="", answer="", object=_hash(window), category=self.name)
            for number, window in enumerate(windows)
        ]
        guess = -log(chat.network.config.vocab_size)
        found = Measured(
            items=evaluation_set(self.name, Kind.TEXT, items, chance=guess),
            metric="minus_loss",
            scores=tuple(-loss for loss in losses),
        )
        return Report(measured=[found])

    def _text(self) -> str:
        return Path(self.path).read_text(encoding="utf-8")

    def _windows(self, chat: ChatModel) -> list[tuple[int, ...]]:
        # It is longer than the model can read, of which there is no need to warn.
        ids = chat.tokenizer(self._text(), add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - self.window + 1, self.window)
        windows = [tuple(ids[start : start + self.window]) for start in starts][: self.max_windows]
        if len(set(windows)) < FEWEST:
            raise ValueError(
                f"benchmark {self.name}: {Path(self.path).name} has {len(ids)} tokens, not {FEWEST} different windows "
                f"of {self.window}; give a longer text or a smaller window"
            )
        return windows


def _hash(window: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, window)).encode()).hexdigest()[:16]
