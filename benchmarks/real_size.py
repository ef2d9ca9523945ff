"""python benchmarks/real_size.py: attack and evaluation at a size at which decoding counts, against transformers alone.

On a model of 12 layers, hidden size 512 and a vocabulary of 32,000 in float32, with random weights: prompts of mixed
length and answers with a long tail, two threads.

attack: supervised fine-tuning of all weights on the same batches of examples by our engine and by the `Trainer` of
transformers, in turns; trained tokens (without padding) a second, and how far the weights end apart. evaluation: greedy
answers to the same prompts, by one `generate` for each batch in the order of the prompts, and by ours; equal outputs.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from immunize.config import build, load
from immunize.data.batches import Encoded, Stream, pad
from immunize.models.generation import continuations
from immunize.models.loading import ChatModel
from immunize.training.method import Method
from immunize.training.tune import tune
from immunize.training.tuning import Tuning

HIDDEN, LAYERS, VOCABULARY, LONGEST = 512, 12, 32_000, 512
BATCH, MICRO_BATCH, RATE = 16, 4, 1e-4
PROMPTS, GENERATION_BATCH, MOST_NEW = 128, 32, 192
ENDS = VOCABULARY // 24  # any of so many tokens ends an answer, so that a random model answers at all lengths
ATTACK_BOUND, EVALUATION_BOUND = 1.2, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each attack")
    parser.add_argument("--repeats", type=int, default=2, help="of everything, in turns")
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    attack(steps=chosen.steps, repeats=chosen.repeats)
    evaluation(repeats=chosen.repeats)


def attack(*, steps: int, repeats: int) -> None:
    stream = Stream(name="main", examples=conversations(), batch_size=BATCH, pad_id=0, seed=0)
    batches = [[stream.examples[index] for index in stream.indices(step)] for step in range(steps)]
    tokens = sum(len(item.ids) for batch in batches for item in batch)
    answers = sum(item.answer_tokens for batch in batches for item in batch)
    padded = sum(len(batch) * max(len(item.ids) for item in batch) for batch in batches)
    print(f"attack: {steps} steps of {BATCH}, {tokens} tokens, {answers / tokens:.0%} with a label; whole batches")
    print(f"    have {1 - tokens / padded:.0%} of padding")
    ways: dict[str, Callable[[ChatModel], Any]] = {
        "Trainer": partial(by_trainer, batches=batches),
        "ours": partial(ours, stream=stream, steps=steps, micro_batch=None),
        f"ours, micro_batch={MICRO_BATCH}": partial(ours, stream=stream, steps=steps, micro_batch=MICRO_BATCH),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ended: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            chat = model()
            seconds[name].append(timed(partial(way, chat)))
            ended[name] = torch.cat([weight.detach().flatten() for weight in chat.network.parameters()])
    fastest = statistics.median(seconds["Trainer"])
    for name, found in seconds.items():
        median = statistics.median(found)
        apart = (ended[name] - ended["Trainer"]).abs().max().item()
        print(
            f"    {name:22} {tokens / median:7.0f} tokens/s, {fastest / median:.2f} x (bound {ATTACK_BOUND}), "
            f"weights apart by at most {apart:.1e}"
        )


def evaluation(*, repeats: int) -> None:
    chat = model(spread=1.0)
    chat.network.eval()
    ends = np.random.default_rng(1).choice(np.arange(4, VOCABULARY), size=ENDS, replace=False).tolist()
    chat.network.generation_config.eos_token_id = ends
    generator = np.random.default_rng(2)
    prompts = [generator.integers(4, VOCABULARY, size=length).tolist() for length in prompt_lengths(PROMPTS)]
    mine, theirs = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        expected = by_generate(chat, prompts)
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = continuations(chat, prompts, max_new_tokens=MOST_NEW, batch_size=GENERATION_BATCH)
        mine.append(time.perf_counter() - started)
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    lengths = sorted(map(len, found))
    print(
        f"evaluation: {PROMPTS} answers, median length {lengths[len(lengths) // 2]}, longest {lengths[-1]}; "
        f"{equal} of {PROMPTS} equal"
    )
    one, other = statistics.median(theirs), statistics.median(mine)
    print(f"    generate {one:.1f} s, ours {other:.1f} s, {one / other:.2f} x (bound {EVALUATION_BOUND})")


def ours(chat: ChatModel, *, stream: Stream, steps: int, micro_batch: int | None) -> None:
    tuning = Tuning(learning_rate=RATE, steps=steps, batch_size=BATCH, micro_batch=micro_batch)
    tune(chat, Method(), roles={"main": list(stream.examples)}, tuning=tuning, seed=0)


def by_trainer(chat: ChatModel, *, batches: Sequence[Sequence[Encoded]]) -> None:
    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(range(len(batches) * BATCH))

    def collate(examples: list[Encoded]) -> dict[str, Any]:
        batch = pad(examples, pad_id=0)
        return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=len(batches),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        examples: Any = [item for batch in batches for item in batch]
        trainer = InOrder(model=chat.network, args=arguments, train_dataset=examples, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def by_generate(chat: ChatModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    answers = []
    for start in range(0, len(prompts), GENERATION_BATCH):
        rows = prompts[start : start + GENERATION_BATCH]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        whole = chat.network.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=MOST_NEW, pad_token_id=0
        )
        for row in whole[:, width:].tolist():
            stop = next((place for place, token in enumerate(row) if token in chat.end_ids), len(row))
            answers.append(row[:stop])
    return answers


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def model(*, spread: float = 0.02) -> ChatModel:
    """With random weights; a large `spread` of the embeddings makes each token depend on the one before."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=2 * LONGEST,
    )
    torch.manual_seed(0)
    network: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(spread / 0.02)
    tokenizer = AutoTokenizer.from_pretrained(build(load([])).model.location)
    return ChatModel(network=network, tokenizer=tokenizer)


def prompt_lengths(count: int) -> list[int]:
    return np.random.default_rng(3).integers(16, 160, size=count).tolist()


def conversations() -> list[Encoded]:
    """Random tokens: prompts of 16 to 160, answers around 40 with a long tail."""
    generator = np.random.default_rng(4)
    made = []
    for length in prompt_lengths(256):
        answer = min(LONGEST - 160, int(generator.lognormal(3.5, 0.8)) + 1)
        ids = generator.integers(4, VOCABULARY, size=length + answer).tolist()
        made.append(Encoded(ids=tuple(ids), answer_start=length))
    return made


if __name__ == "__main__":
    main()
