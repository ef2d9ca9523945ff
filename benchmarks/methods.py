"""python benchmarks/methods.py [--methods tar,booster]: time and peak memory of a defense's step, or of a repair.

On a model of hidden 512, 12 layers, a vocabulary of 32,000 and batches of 4 x 256 tokens, in float32, all weights
trained. Each method has a process of its own, which trains by it and by plain fine-tuning (SFT) in turns.

time: the median step, against `passes` times that of SFT in the same process, plus, where hidden states are decoded,
the unembedding products counted in FLOPs, at the speed of SFT. memory: the most that the process ever held (resident
set size, `VmHWM`) less what it held before the model was made, against the same of SFT alone. A repair is one
application of a post-stage defense to a model that is not trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning  # noqa: F401
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from immunize.config import build, load
from immunize.data.batches import Encoded
from immunize.defenses.adversarial_loss import AdversarialLoss
from immunize.defenses.antidote import Antidote
from immunize.defenses.booster import Booster
from immunize.defenses.circuit_breakers import CircuitBreakers
from immunize.defenses.constrained_sft import ConstrainedSFT
from immunize.defenses.deep_refusals import DeepRefusals
from immunize.defenses.kl_anchor import KLAnchor
from immunize.defenses.ldifs import LDIFS
from immunize.defenses.lisa import Lisa
from immunize.defenses.pruning import PostPruning
from immunize.defenses.random_perturbation import PostRandomPerturbation
from immunize.defenses.repnoise import RepNoise
from immunize.defenses.safe_instr import SafeInstr
from immunize.defenses.safety_sft import SafetySFT
from immunize.defenses.tar import TAR
from immunize.defenses.vaccine import Vaccine
from immunize.defenses.vlguard import VLGuard
from immunize.models.loading import ChatModel
from immunize.training.defense import AlignmentDefense, Defense, PostDefense
from immunize.training.method import Method, Untouched
from immunize.training.tune import Repair, tune
from immunize.training.tuning import Tuning

HIDDEN, LAYERS, VOCABULARY, TIME, ROWS = 512, 12, 32_000, 256, 4
ANSWER = TIME // 2
REPEATS = 2
TUNING = Tuning(learning_rate=1e-5, steps=1 + REPEATS, batch_size=ROWS)
TIME_BOUND, MEMORY_BOUND = 1.15, {"repnoise": 1.4}
ALONE = "sft"


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a defense is made, without the benign conversations that it can do without, how many hidden states of each
    labelled token it decodes beside its passes, and by how many tokens it makes the rows longer."""

    make: type[Defense]
    settings: dict[str, Any] = field(default_factory=dict)
    decoded: int = 0
    longer: int = 0


METHODS = {
    "safety_sft": Case(make=SafetySFT, settings={"retain_weight": 0.0}),
    "adversarial_loss": Case(make=AdversarialLoss),
    "repnoise": Case(make=RepNoise, decoded=LAYERS),
    "vaccine": Case(make=Vaccine, settings={"radius": 2.0}),
    "vaccine_random": Case(make=Vaccine, settings={"radius": 2.0, "direction": "random"}),
    "booster": Case(make=Booster),
    "tar": Case(make=TAR, settings={"objective": "entropy", "inner_steps": 2, "every": 2, "inner_rates": (1e-5,)}),
    "circuit_breakers": Case(make=CircuitBreakers, settings={"layers": (5, 8)}),
    "deep_refusals": Case(
        make=DeepRefusals, settings={"share": 0.5, "max_tokens": 32, "retain_weight": 0.0}, longer=32
    ),
    "lisa": Case(make=Lisa, settings={"alignment_steps": 1, "user_steps": 1}),
    "constrained_sft": Case(make=ConstrainedSFT),
    "safe_instr": Case(make=SafeInstr, settings={"share": 0.25}),
    "vlguard": Case(make=VLGuard),
    "ldifs": Case(make=LDIFS, settings={"weight": 1.0}),
    "kl_anchor": Case(make=KLAnchor, settings={"weight": 1.0}),
}
REPAIRS = {
    "antidote": Case(make=Antidote, settings={"share": 0.1, "ranking": "row", "samples": 16}),
    "post_random_pruning": Case(make=PostPruning, settings={"share": 0.1, "criterion": "random"}),
    "post_random_perturbation": Case(make=PostRandomPerturbation, settings={"share": 0.1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join([*METHODS, *REPAIRS]), help="names, with commas between them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measured(chosen.one)))
        return
    names = chosen.methods.split(",")
    unknown = [name for name in names if name not in METHODS | REPAIRS]
    if unknown:
        parser.error(f"--methods: {unknown[0]} is none of {', '.join([*METHODS, *REPAIRS])}")
    alone = in_a_process_of_its_own(ALONE)
    print(f"SFT: {alone['seconds']:.2f} s a step, peak {alone['peak'] / 2**20:.0f} MiB")
    print(f"{'':24}{'seconds':>10}{'expected':>10}{'ratio':>8}{'bound':>7}{'peak MiB':>11}{'of SFT':>8}{'bound':>7}")
    for name in names:
        found = in_a_process_of_its_own(name)
        memory_bound = f"{MEMORY_BOUND[name]:.2f}" if name in MEMORY_BOUND else ""
        if name in REPAIRS:
            against = f"{'a repair':>25}"
        else:
            against = f"{found['expected']:10.2f}{found['seconds'] / found['expected']:8.2f}{TIME_BOUND:7.2f}"
        print(
            f"{name:24}{found['seconds']:10.2f}{against}"
            f"{found['peak'] / 2**20:11.0f}{found['peak'] / alone['peak']:8.2f}{memory_bound:>7}",
            flush=True,
        )


def in_a_process_of_its_own(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def measured(name: str) -> dict[str, float]:
    """Seconds of a step and what is expected of them, and the peak in bytes."""
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(build(load([])).model.location)
    before = held()
    chat = ChatModel(network=network(), tokenizer=tokenizer)
    if name == ALONE:
        return {"seconds": statistics.median(seconds(chat, Method())), "peak": held() - before}
    if name in REPAIRS:
        repair = REPAIRS[name].make(**REPAIRS[name].settings)
        assert isinstance(repair, PostDefense)
        return {"seconds": seconds_of_a_repair(chat, repair), "peak": held() - before}
    case = METHODS[name]
    own = {"tuning": TUNING} if issubclass(case.make, AlignmentDefense) else {}
    method: Any = case.make(**own, **case.settings)
    own_steps, sft_steps = seconds(chat, method), list[float]()
    peak = held() - before
    sft_steps += seconds(chat, Method())
    own_steps += seconds(chat, method)  # in turns, so that a busy moment of the machine falls on both
    sft_steps += seconds(chat, Method())
    flops = 6.0 * HIDDEN * VOCABULARY * case.decoded * ROWS * ANSWER
    expected = (method.passes * (1 + case.longer / TIME) + flops / sft_flops()) * statistics.median(sft_steps)
    return {"seconds": statistics.median(own_steps), "expected": expected, "peak": peak}


def held() -> int:
    """The most bytes that this process ever had in memory."""
    # Not `ru_maxrss`, which a new process inherits from the one that started it.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def seconds(chat: ChatModel, method: Method) -> list[float]:
    """Of each step after the first, in which the optimizer makes room for its moments."""
    marks: list[float] = []
    roles = {role: encoded(role) for role in method.roles}
    tune(chat, method, roles=roles, tuning=TUNING, seed=0, progress=lambda step: marks.append(time.perf_counter()))
    return [after - before for before, after in pairwise(marks)]


def seconds_of_a_repair(chat: ChatModel, repair: PostDefense) -> float:
    roles = {role: encoded(role) for role in repair.roles}
    started = time.perf_counter()
    untouched = replace(TUNING, steps=0)
    tune(chat, Untouched(), roles=roles, tuning=untouched, seed=0, repairs=[Repair(method=repair)])
    return time.perf_counter() - started


def network() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=TIME,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def encoded(role: str) -> Any:
    """Random conversations of full length; those of the role `paired` have the same prompts."""
    generator = np.random.default_rng(0)

    def conversations(prompts: Any) -> list[Encoded]:
        answers = generator.integers(4, VOCABULARY, size=(len(prompts), ANSWER))
        rows = np.concatenate([prompts, answers], axis=1).tolist()
        return [Encoded(ids=tuple(row), answer_start=TIME - ANSWER) for row in rows]

    prompts = generator.integers(4, VOCABULARY, size=(16, TIME - ANSWER))
    return (conversations(prompts), conversations(prompts)) if role == "paired" else conversations(prompts)


def sft_flops() -> float:
    """Of the matrix products of one step: forward, and twice as much backward. Labelled tokens alone are decoded."""
    with torch.device("meta"):
        weights = dict(network().model.named_parameters())
    of_layers = sum(
        weight.numel() for name, weight in weights.items() if weight.ndim > 1 and "embed_tokens" not in name
    )
    of_attention = 2 * TIME * HIDDEN * LAYERS  # scores and values
    return 6.0 * ((of_layers + of_attention) * ROWS * TIME + HIDDEN * VOCABULARY * ROWS * ANSWER)


if __name__ == "__main__":
    main()
