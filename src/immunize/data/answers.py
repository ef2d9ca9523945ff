"""What a stage that answers prompts leaves behind: generations, and what had been spent by then."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from immunize.records import write_private_lines
from immunize.types import Generation


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the tuning had spent by `step`; zero before it."""

    step: int
    examples: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The generations of one stage, in the order in which they were made, and the cost of each measured step."""

    generations: Sequence[Generation]
    costs: Sequence[Cost]

    def cost_at(self, step: int) -> Cost:
        return next(cost for cost in self.costs if cost.step == step)


def save_answers(folder: Path, answers: Answers) -> None:
    """Write answers.jsonl.gz (private: generated text) and costs.jsonl."""
    write_private_lines(folder / "answers.jsonl.gz", [asdict(generation) for generation in answers.generations])
    (folder / "costs.jsonl").write_text("".join(json.dumps(asdict(cost)) + "\n" for cost in answers.costs))


def load_answers(folder: Path) -> Answers:
    with gzip.open(folder / "answers.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return Answers(
        generations=[
            Generation(
                measured_on=row["measured_on"],
                step=row["step"],
                texts=tuple(row["texts"]),
                losses=tuple(row["losses"]),
            )
            for row in rows
        ],
        costs=[Cost(**json.loads(line)) for line in (folder / "costs.jsonl").read_text().splitlines()],
    )
