"""python benchmarks/speed.py: what the suite costs against bare PyTorch, all figures in one run.

Medians over interleaved repeats, so that a busy moment of the machine falls on both sides.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from immunize import run
from immunize.config import Cell, build, load
from immunize.data.batches import IGNORED, Batch, FixedBatches, Stream
from immunize.data.splits import defense_examples, exposures
from immunize.models.chat import encode_texts, render_prompt
from immunize.models.generation import greedy
from immunize.models.loading import ChatModel
from immunize.models.loading import load as load_model
from immunize.training.method import Method
from immunize.training.roles import encode_pairs, encode_roles
from immunize.training.tune import tune
from immunize.training.tuning import Tuning

STEPS = 100
REPEATS = 5
BATCH = 16


def main() -> None:
    torch.set_num_threads(2)
    cell = build(load([]))
    exposure = exposures(cell.data, cell.split)[0]
    sft_against_bare_loop(cell, exposure.attack)
    repnoise_against_its_passes(cell)
    generation_against_bare_loop(cell, [example.prompt for example in exposure.evaluation])
    shares_of_the_default_run()


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def fresh(cell: Cell) -> ChatModel:
    return load_model(cell.model, device="cpu")


def bare_sft(chat: ChatModel, batches: list[Batch], *, rate: float) -> None:
    """The loop that anybody would write."""
    network = chat.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0, fused=True)
    for batch in batches:
        logits = network(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def sft_against_bare_loop(cell: Cell, examples: Any) -> None:
    tuning = Tuning(learning_rate=3e-4, steps=STEPS, batch_size=BATCH)
    ours, bare = [], []
    for _ in range(REPEATS):
        chat = fresh(cell)
        encoded = encode_pairs(chat, examples)
        stream = Stream(name="main", examples=encoded, batch_size=BATCH, pad_id=chat.pad_id, seed=0)
        loader = FixedBatches(stream, steps=STEPS)
        batches = [loader[step] for step in range(STEPS)]
        bare.append(seconds(partial(bare_sft, chat, batches, rate=3e-4)))
        chat = fresh(cell)
        roles = {"main": encoded}
        ours.append(seconds(partial(tune, chat, Method(), roles=roles, tuning=tuning, seed=0)))
    report("plain SFT, ms per step", ours, bare, per=STEPS, bound=1.10)


def repnoise_against_its_passes(cell: Cell) -> None:
    defense = cell.defense["repnoise"]
    pairs = defense_examples(cell.data)
    repnoise, passes, unembedding, counted = [], [], [], 0
    for _ in range(REPEATS):
        chat = fresh(cell)
        roles = encode_roles(chat, defense.roles, pairs=pairs, retain=cell.task.retain.train())
        calls: list[int] = []
        hook = chat.network.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        tuning = Tuning(learning_rate=3e-4, steps=STEPS, batch_size=BATCH)
        repnoise.append(seconds(partial(tune, chat, defense, roles=roles, tuning=tuning, seed=0)))
        hook.remove()
        counted = len(calls) // STEPS
        chat = fresh(cell)
        encoded = encode_pairs(chat, pairs)
        stream = Stream(name="main", examples=encoded, batch_size=BATCH, pad_id=chat.pad_id, seed=0)
        batches = [FixedBatches(stream, steps=STEPS)[step] for step in range(STEPS)]
        passes.append(counted * seconds(partial(bare_sft, chat, batches, rate=3e-4)))
        depth = chat.network.config.num_hidden_layers
        labelled = int((batches[0].labels != IGNORED).sum())
        unembed = chat.network.get_output_embeddings()
        hidden = torch.randn(depth * labelled, chat.network.config.hidden_size)

        def product(unembed: Any = unembed, hidden: Any = hidden) -> None:
            for _ in range(STEPS):
                unembed(hidden).logsumexp(-1).sum().backward()

        unembedding.append(seconds(product))
    report(
        f"RepNoise, ms per step, against {counted} bare SFT passes",
        repnoise,
        [a + b for a, b in zip(passes, unembedding, strict=True)],
        per=STEPS,
    )
    print(f"{'':4}of which the unembedding of every depth: {statistics.median(unembedding) / STEPS * 1e3:.1f} ms")


@torch.no_grad()
def bare_generation(chat: ChatModel, input_ids: torch.Tensor, mask: torch.Tensor, limit: int) -> None:
    """A greedy loop with a key-value cache and nothing else, on prompts already padded."""
    ends = torch.tensor(sorted(chat.end_ids))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    cache = None
    for _ in range(limit):
        output = chat.network(
            input_ids=input_ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1)
        ended |= torch.isin(token, ends)
        if ended.all():
            return
        input_ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position[:, -1:] + 1


def generation_against_bare_loop(cell: Cell, prompts: list[str]) -> None:
    chat = fresh(cell)
    chat.network.eval()
    limit = cell.model.max_new_tokens
    encoded = encode_texts(chat, [render_prompt(chat, prompt) for prompt in prompts])
    width = max(map(len, encoded))
    input_ids = torch.tensor([[chat.pad_id] * (width - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
    ours, bare = [], []
    for _ in range(4 * REPEATS):
        ours.append(seconds(lambda: greedy(chat, encoded, max_new_tokens=limit)))
        bare.append(seconds(lambda: bare_generation(chat, input_ids, mask, limit)))
    report(f"{len(prompts)} greedy answers, ms", ours, bare, per=1, bound=1.15)


def shares_of_the_default_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        finished = run([f"runtime.root={folder}", "runtime.progress=false"])
        total = time.perf_counter() - begun
        stages = json.loads((Path(finished.path) / "manifest.json").read_text())["stages"]
    kinds: dict[str, float] = {}
    for stage in stages:
        kinds[stage["kind"]] = kinds.get(stage["kind"], 0.0) + stage["seconds"]
    kinds["records, figure, W&B, imports"] = total - sum(kinds.values())
    print(f"the default run: {total:.1f} s")
    for kind, spent in kinds.items():
        print(f"    {kind:30} {spent:6.1f} s  {100 * spent / total:4.0f} %")


def report(what: str, ours: list[float], bare: list[float], *, per: int, bound: float | None = None) -> None:
    mine, theirs = statistics.median(ours), statistics.median(bare)
    limit = f" (bound {bound:.2f})" if bound else ""
    print(f"{what}: {mine / per * 1e3:.1f} against {theirs / per * 1e3:.1f} bare, ratio {mine / theirs:.2f}{limit}")


if __name__ == "__main__":
    main()
