"""Where a judge's model comes from, and what its next token is: a folder, or the hub at a commit.

A judge's model needs no chat template and generates no answers, so it is no `models.sources.ModelSource`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from immunize.models.sources import COMMIT_HINT, READ
from immunize.stages import hash_folder

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A folder (`path`), known by its content; or the model `id` of the hub at `commit`.

    An adapter folder or repository loads its base model by the name it gives, at no pinned revision: merge the two
    into one folder where that matters.
    """

    version: ClassVar[int] = 1
    id: str | None = None
    commit: str | None = field(default=None, metadata={"hint": f"{COMMIT_HINT}; or a folder: path=FOLDER commit=null"})
    path: str | None = None
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.commit is None):
            raise ValueError("path: give either a folder (and commit=null), or an id of the hub with its commit")
        if self.path is not None and not list(Path(self.path).glob("*config.json")):
            raise ValueError(f"path={self.path}: has no config.json; give a folder written by save_pretrained")
        if self.commit is None:
            return
        if self.id is None:
            raise ValueError("id: a commit is one of a repository of the hub; give its id")
        if len(self.commit) != 40 or not set(self.commit) <= set("0123456789abcdef"):
            raise ValueError(
                f"commit={self.commit}: must be the 40 hexadecimal digits of a commit, since branches and tags move; "
                f"huggingface.co/{self.id}/commits/main lists them"
            )

    @cached_property
    def _content(self) -> Any:
        if self.path is not None:
            return hash_folder(Path(self.path), suffixes=READ)
        return {"id": self.id, "commit": self.commit}

    def identity(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "version": self.version, "content": self._content, "dtype": self.dtype}

    def load(self, kind: Literal["AutoModelForCausalLM", "AutoModelForSequenceClassification"], *, device: str) -> Any:
        """The network in eval mode, and its tokenizer."""
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
        place: dict[str, Any] = {"revision": self.commit, "trust_remote_code": False}
        location = self.path or self.id
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **place)
        network, read = getattr(transformers, kind).from_pretrained(
            location, dtype=getattr(torch, self.dtype), use_safetensors=True, output_loading_info=True, **place
        )
        if read["missing_keys"]:  # the library would go on with random ones, as for a classifier's head
            raise ValueError(
                f"model {location}: lacks the weights {', '.join(sorted(read['missing_keys']))} of "
                f"{type(network).__name__}; choose a model that was trained as one"
            )
        return network.to(device).eval(), tokenizer


@torch.no_grad()
def word_chances(
    network: Any, tokenizer: Any, texts: Sequence[Sequence[int]], *, words: Sequence[str], batch_size: int
) -> torch.Tensor:
    """How likely each of `words` comes next after each row of token ids: (texts, words), float32.

    A word of several tokens is as likely as all of them in turn, so that words that begin alike are told apart. A text
    that is longer than the model can read is NaN.
    """
    tokens = [tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
    if not all(tokens) or len(set(tokens)) < len(tokens):
        raise ValueError(f"words={list(words)}: the tokenizer cannot tell them apart")
    begun = sorted({word[:length] for word in tokens for length in range(len(word))})
    longest = (getattr(network.config, "max_position_embeddings", None) or math.inf) - max(map(len, tokens))
    readable = [row for row, text in enumerate(texts) if len(text) <= longest]
    order = sorted(readable, key=lambda row: (len(texts[row]), row))
    found = torch.full((len(texts), len(words)), math.nan)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        after = {begin: _next(network, [[*texts[row], *begin] for row in rows]) for begin in begun}
        for column, word in enumerate(tokens):
            logs = [after[word[:length]][:, token] for length, token in enumerate(word)]
            found[rows, column] = torch.stack(logs).sum(0).exp()
    return found


def _next(network: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of the token after each text: (texts, vocabulary), float32 on the CPU."""
    device = network.device
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):  # on the left, so that the next token of every row comes at the same position
        ids[row, width - len(text) :] = torch.tensor(list(text))
        mask[row, width - len(text) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = network(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=1,
    ).logits[:, -1]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
