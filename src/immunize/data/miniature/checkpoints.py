"""Rebuilds the miniature's checkpoints as ordinary Hugging Face folders, with the SHA-256 of every file."""

import hashlib
from copy import deepcopy
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from immunize.data.miniature.build import SHIPPED, Recipe, new_model, phases, train, vocabulary_tokenizer

SUMS = "SHA256SUMS"
_ANSWER_TOKENS = 16


def build(directory: Path, *, recipe: Recipe = SHIPPED, device: str = "cpu") -> str:
    """Trains both checkpoints and writes them under the directory; returns the text of its `SHA256SUMS`.

    Two threads whatever the machine has: another number changes the bits of the weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tokenizer = vocabulary_tokenizer(recipe)
        model = new_model(tokenizer, recipe)
        model.to(device)  # type: ignore[arg-type]  # torch's own, which the wrapper of transformers hides
        for phase in phases(recipe):
            train(model, tokenizer, phase, batch_size=recipe.batch_size)
            _write(directory / phase.name, model, tokenizer)
    finally:
        torch.set_num_threads(threads)
    sums = checksums(directory)
    (directory / SUMS).write_text(sums)
    return sums


def checksums(directory: Path) -> str:
    """One line per file below the directory, as `sha256sum` writes and checks them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory).as_posix()}" for path in files
    ]
    return "\n".join(lines) + "\n"


def _write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    folder.mkdir(parents=True)
    shipped = deepcopy(model)  # the float32 weights are trained on
    for parameter in shipped.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # half the size; rounding costs no answer
    shipped.config.dtype = torch.bfloat16
    shipped.generation_config = GenerationConfig(
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    shipped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
