"""Where a model comes from: shipped with the package, a local folder, or the Hugging Face hub at a pinned revision."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from immunize.stages import hash_folder

Dtype = Literal["float32", "bfloat16", "float16"]
READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what loading a model reads
COMMIT_HINT = ", the 40 hexadecimal digits of a commit, as huggingface.co/{id}/commits/main lists them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_folder(folder: Path) -> None:
    """Refuse a folder from which no model can be loaded, before anything heavy is imported."""
    if not folder.is_dir():
        raise ValueError(f"path={folder}: no such folder; give one that holds a Hugging Face model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"path={folder}: has no config.json; give a folder written by save_pretrained")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"path={folder}: has no *.safetensors; convert the weights with save_pretrained first")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"path={folder}: has no tokenizer (tokenizer.json); save the model's tokenizer there too")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    try:
        return config.is_file() and "chat_template" in json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"path={folder}: its tokenizer_config.json is no JSON ({error})") from error


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A causal language model with tokenizer and chat template.

    dtype: of the weights, while training and while answering; it changes results, so it belongs to the model.
    generation_batch: answers generated side by side; padding changes the last bits, so it belongs here as well.
    max_new_tokens: the longest answer, in tokens.
    base: the unaligned model under which incoherent answers are recognized; without it, by repetition and length only.
    """

    version: ClassVar[int] = 1
    dtype: Dtype = "float32"
    generation_batch: int = 64
    max_new_tokens: int = 50
    base: "ModelSource | None" = None

    def __post_init__(self) -> None:
        if self.generation_batch < 1:
            raise ValueError(f"generation_batch={self.generation_batch}: must be at least 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")

    def check_chat(self) -> None:
        """Raise ValueError where it can be seen that it has no chat template, which a base does not need."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def location(self) -> str:
        """What `from_pretrained` is given: a folder or a hub id."""
        raise NotImplementedError

    @property
    def revision(self) -> str | None:
        return None

    def content(self) -> Any:
        """What the weights and the tokenizer are, whatever the place they lie in."""
        return hash_folder(Path(self.location), suffixes=READ)

    @cached_property
    def weights_identity(self) -> dict[str, Any]:
        """What determines the weights; hashed once, since a folder may hold gigabytes."""
        return {"class": type(self).__name__, "version": self.version, "content": self.content(), "dtype": self.dtype}

    @property
    def generation_identity(self) -> dict[str, Any]:
        """What determines the answers of given weights."""
        return {"batch": self.generation_batch, "max_new_tokens": self.max_new_tokens}

    def identity(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.weights_identity
        return {"weights": self.weights_identity, "generation": self.generation_identity, "base": base}


@dataclass(frozen=True, kw_only=True)
class ShippedModel(ModelSource):
    """One of the miniature's two checkpoints, inside the package."""

    checkpoint: Literal["aligned", "base"] = "aligned"

    @property
    def name(self) -> str:
        return f"miniature/{self.checkpoint}"

    @property
    def location(self) -> str:
        return str(Path(__file__).parent / "miniature" / self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class LocalModel(ModelSource):
    """An ordinary Hugging Face model folder; known by its content, so it may be moved."""

    path: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(Path(self.path))

    def check_chat(self) -> None:
        if not _has_chat_template(Path(self.path)):
            raise ValueError(f"path={self.path}: its tokenizer has no chat template; put a chat_template.jinja there")

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def location(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class HubModel(ModelSource):
    """A model of the Hugging Face hub at a commit."""

    id: str
    commit: str = field(metadata={"hint": COMMIT_HINT})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.commit) != 40 or not set(self.commit) <= set("0123456789abcdef"):
            raise ValueError(
                f"commit={self.commit}: must be the 40 hexadecimal digits of a commit, since branches and tags move; "
                f"huggingface.co/{self.id}/commits/main lists them"
            )

    @property
    def name(self) -> str:
        return self.id

    @property
    def location(self) -> str:
        return self.id

    @property
    def revision(self) -> str | None:
        return self.commit

    def content(self) -> Any:
        return {"id": self.id, "commit": self.commit}
