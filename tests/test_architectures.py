"""Random folders of other architectures than the miniature's, each through all that is done with a model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from immunize.data.batches import pad
from immunize.models import adapters, predictions
from immunize.models.chat import encode
from immunize.models.generation import answer
from immunize.models.loading import ChatModel, load, load_folder
from immunize.models.predictions import predict
from immunize.models.sources import LocalModel
from immunize.training.measuring import reference_losses
from immunize.training.method import Method
from immunize.training.sites import final_norm_and_unembedding, sites
from immunize.training.tune import prepare_trainable, tune
from immunize.training.tuning import FullParameter, LoRA, Optimizer, Tuning
from immunize.types import Example
from tests.conftest import VOCABULARY
from tests.test_conformance import METHODS, Case

CPU = "cpu"
GROUPED = {"num_key_value_heads": 2}
# Class of the configuration in transformers, and what is its own; Gemma 2's bounds are low enough to be felt.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 0.5},
    ),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
}
EACH_ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
LORA = LoRA(rank=2, alpha=8.0)
ONE = Tuning(learning_rate=1e-3, steps=1, batch_size=2, optimizer=Optimizer(weight_decay=0.1))
PROMPTS = ["the apple", "an answer is the other apple", "plums"]


@pytest.fixture(scope="session")
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One ordinary model folder for each architecture: two layers, hidden size 32, random weights."""
    import transformers

    root = tmp_path_factory.mktemp("architectures")
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    for name, (config, own) in ARCHITECTURES.items():
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**shared, **own})
        network: Any = transformers.AutoModelForCausalLM.from_config(made)
        network.save_pretrained(root / name)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, root / name)
    return {name: root / name for name in ARCHITECTURES}


@pytest.fixture
def make(folders: dict[str, Path]) -> Callable[..., ChatModel]:
    return lambda name, dtype="float32": load(LocalModel(path=str(folders[name]), dtype=dtype), device=CPU)


Make = Callable[..., ChatModel]


def logits(chat: ChatModel, texts: list[str]) -> Tensor:
    batch = pad(encode(chat, [(text, "plums") for text in texts]), pad_id=chat.pad_id)
    with torch.no_grad():
        return chat.network(input_ids=batch.input_ids, use_cache=False).logits


@EACH_ARCHITECTURE
def test_masks_and_answers(name: str, make: Make) -> None:
    """Answers beside longer prompts, with a cache, are those of single prompts that are read anew for each token.

    They run past the sliding window. The losses of an answer do not feel the padding after it.
    """
    chat = make(name)
    assert chat.end_ids == {1} and chat.network.config.model_type == name
    (item,) = encode(chat, [("the apple", "plums")])
    assert chat.tokenizer.decode(item.ids[item.answer_start :]) == "plums<end>"
    examples = [
        Example(id=text, prompt=text, answer="plums are the answer", object="o", category="c") for text in PROMPTS
    ]
    together = reference_losses(chat, examples, batch_size=3)
    assert together == pytest.approx(reference_losses(chat, examples, batch_size=1), rel=1e-4)
    found = answer(chat, PROMPTS, max_new_tokens=12, batch_size=3)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = list(encode(chat, [(prompt, "")])[0].ids[:-1])
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                token = int(chat.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in chat.end_ids:
                break
            ids.append(token)
        assert text == chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@EACH_ARCHITECTURE
def test_sites_and_lens(name: str, make: Make) -> None:
    """One site a layer; and the lens on the residual stream after the last layer gives the model's own logits."""
    chat = make(name)
    network, seen = chat.network, {}
    last = list(sites(network, "residual").values())[-1]
    handle = last.register_forward_hook(lambda module, args, output: seen.update(last=output))
    expected = logits(chat, PROMPTS)
    handle.remove()
    norm, unembed = final_norm_and_unembedding(network)
    torch.testing.assert_close(unembed(norm(seen["last"])), expected)
    assert all(len(sites(network, kind)) == 2 for kind in ("attention", "mlp"))


@EACH_ARCHITECTURE
def test_packed_predictions_are_those_of_every_position(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below an adapter of the unembedding; and the hook is gone afterwards."""
    chat = make(name)
    unembedding = next(key for key, m in chat.network.named_modules() if m is chat.network.get_output_embeddings())
    adapters.attach(chat, rank=2, alpha=4.0, dropout=0.0, targets=(unembedding,), seed=0)
    batch = pad(encode(chat, [(prompt, "plums are the answer") for prompt in PROMPTS]), pad_id=chat.pad_id)
    dense = predict(chat.network, batch.input_ids, batch.labels, hidden_states=True)
    monkeypatch.setattr(predictions, "MOST_LOGITS", 0)
    packed = predict(chat.network, batch.input_ids, batch.labels, hidden_states=True)
    assert packed.packed and not dense.packed
    torch.testing.assert_close(packed.logits, dense.logits[dense.labelled])
    assert torch.equal(packed.targets, dense.targets[dense.labelled])
    assert all(torch.equal(*pair) for pair in zip(packed.states, dense.states, strict=True))
    assert logits(chat, PROMPTS).ndim == 3


@EACH_ARCHITECTURE
def test_one_step_of_every_defense(name: str, make: Make, roles: dict[str, Any]) -> None:
    """Every matrix moves; and every adapter, those of a mixture's experts too, of a model in bfloat16."""
    for key, case in METHODS.items():
        if case.takes_tuning:
            step_of(case, make(name), roles, ONE)
        if key in ("repnoise", "vaccine", "tar_paper"):  # taps, hooks, and a reference that switches the adapter off
            step_of(case, make(name, "bfloat16"), roles, replace(ONE, trainable=LORA))


def step_of(case: Case, chat: ChatModel, roles: dict[str, Any], tuning: Tuning) -> None:
    start = {key: weight.clone() for key, weight in chat.network.named_parameters()}
    tune(chat, case.method(tuning), roles=roles, tuning=tuning, seed=0)
    ended = dict(chat.network.named_parameters())
    assert all(weight.isfinite().all() for weight in ended.values())
    trained = {key: weight for key, weight in ended.items() if weight.requires_grad}
    if isinstance(tuning.trainable, FullParameter):
        assert not any(torch.equal(weight, start[key]) for key, weight in trained.items() if weight.ndim > 1)
    else:
        factors = [weight for key, weight in trained.items() if ".lora_B." in key]
        assert factors and all(weight.any() and weight.dtype is torch.float32 for weight in factors)


@EACH_ARCHITECTURE
def test_adapter_merges_saves_and_reloads(name: str, make: Make, roles: dict[str, Any], tmp_path: Path) -> None:
    """Merged, saved and read again it computes what it did; taken out to be continued, the same again."""
    chat = make(name)
    untrained = logits(chat, PROMPTS)
    tune(chat, Method(), roles=roles, tuning=replace(ONE, learning_rate=0.05, trainable=LORA), seed=0)
    expected = logits(chat, PROMPTS)
    assert (expected - untrained).abs().max() > 1e-3
    adapters.save_adapter(chat, tmp_path / "adapter")
    adapters.merge(chat)
    chat.save(tmp_path / "weights")
    again = load_folder(tmp_path / "weights", dtype="float32", device=CPU)
    assert type(again.network) is type(chat.network)
    torch.testing.assert_close(logits(again, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(again, PROMPTS), logits(chat, PROMPTS))
    prepare_trainable(again, replace(LORA, adapter="continued"), seed=0, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(again, PROMPTS), expected, rtol=1e-4, atol=1e-4)
