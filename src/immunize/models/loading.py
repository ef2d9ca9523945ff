"""Loading and saving a chat model: the network, its tokenizer, and the tokens that end an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from immunize.models.sources import Dtype, ModelSource


@dataclass(kw_only=True)
class ChatModel:
    """A network with the tokenizer whose chat template it was trained with."""

    network: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def pad_id(self) -> int:
        """Any id will do, since masks go by position; the tokenizer's own where there is one."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.end_ids, default=0)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens after which an answer is over."""
        listed = self.network.generation_config.eos_token_id
        ends = set(listed) if isinstance(listed, list) else {listed}
        return frozenset((ends | {self.tokenizer.eos_token_id}) - {None})

    @property
    def parameters(self) -> int:
        """How many weights there are; two of 4 bits lie in one element."""
        packed = [getattr(parameter, "quant_state", None) for parameter in self.network.parameters()]
        plain = [parameter.numel() for parameter in self.network.parameters()]
        return sum(count if state is None else state.shape.numel() for count, state in zip(plain, packed, strict=True))

    def save(self, folder: Path) -> None:
        """Write an ordinary model folder, weights as safetensors."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(source: ModelSource, *, device: str) -> ChatModel:
    """Load the model that `source` names."""
    return _load(source.location, revision=source.revision, dtype=source.dtype, device=device)


def load_tuned(source: ModelSource, folder: Path | None, *, device: str) -> ChatModel:
    """Load the model that `source` names, or what a tuning of it left in `folder`."""
    return load(source, device=device) if folder is None else load_folder(folder, dtype=source.dtype, device=device)


def load_base(source: ModelSource, *, device: str) -> ChatModel:
    """Load a model that nobody talks to, of which many have no chat template: it reads plain text, or lends weights."""
    return _load(source.location, revision=source.revision, dtype=source.dtype, device=device, silent=True)


def load_folder(folder: Path, *, dtype: Dtype, device: str) -> ChatModel:
    """Load a folder that `ChatModel.save` wrote."""
    return _load(str(folder), revision=None, dtype=dtype, device=device)


def outline(source: ModelSource) -> ChatModel:
    """The model without its weights, which are neither read nor fetched: for counting parameters and tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source.location, revision=source.revision)
        return ChatModel(network=AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


def _load(location: str, *, revision: str | None, dtype: Dtype, device: str, silent: bool = False) -> ChatModel:
    """A `silent` model never answers, and needs neither chat template nor end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    if tokenizer.chat_template is None and not silent:
        raise ValueError(f"model {location}: its tokenizer has no chat template; choose a chat model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location,
        revision=revision,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,  # left out, it asks at the terminal whether to run the repository's code
    )
    network, read = loaded
    if read["missing_keys"]:  # the library would go on with random ones
        lacking = sorted(read["missing_keys"])
        raise ValueError(f"model {location}: its files lack {len(lacking)} of its weights, first {lacking[0]}")
    # Answers are greedy; a sampling setting left in the file would make saving the model fail.
    given = network.generation_config
    network.generation_config = GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id
    )
    chat = ChatModel(network=network.to(device), tokenizer=tokenizer)
    if not chat.end_ids and not silent:
        raise ValueError(f"model {location}: names no end token; set eos_token_id in its generation_config.json")
    return chat
