"""Scores of judges that ask a model, kept by (judge, prompt, answer): what was asked once is not asked again.

This lies below the stages: one answer stands in many generations, and a judge at an endpoint costs money. The file
holds no text, only the hash of each conversation with its score. What is missing is not kept, so that it is asked
again the next time.
"""

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from immunize.judges.judge import Answered, Conversation, Judge, ModelJudge, Session, conversations
from immunize.stages import address, identity
from immunize.types import Example

FOLDER = "judged"
DIGITS = 6  # padding and the rest of the batch change the later ones, and what else is asked depends on what is kept
WAIT = 60.0  # seconds for another worker's write, which takes milliseconds


def kept(judge: Judge, *, stages: Path, device: str) -> "Judge | KeptJudge":
    """The judge with its scores kept below `stages`, whatever it is called; one that asks no model, as it is."""
    if not isinstance(judge, ModelJudge):
        return judge
    name = address({"judge": identity(replace(judge, name="any")), "device": device})
    return KeptJudge(judge=judge, device=device, path=stages / FOLDER / f"{name}.sqlite")


@dataclass(kw_only=True)
class KeptJudge:
    """A judge of a model that is opened at the first question whose answer is not in the file.

    `models` are what the judge's side said that it is, over all scores that were given out.
    """

    judge: ModelJudge
    device: str
    path: Path
    models: set[str] = field(default_factory=set)
    _session: Session | None = None

    @property
    def version(self) -> int:
        return self.judge.version

    @property
    def name(self) -> str:
        return self.judge.name

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Harmfulness in the order of the answers; equal conversations are asked once."""
        asked = conversations(examples, answers)
        keys = [address({"prompt": item.prompt, "answer": item.answer}, digits=64) for item in asked]
        known = self._read(keys)
        unknown = {key: item for key, item in zip(keys, asked, strict=True) if key not in known}
        failed: dict[str, Answered] = {}
        for begin in range(0, len(unknown), self.judge.chunk):
            part = list(unknown)[begin : begin + self.judge.chunk]
            found = dict(zip(part, self._ask([unknown[key] for key in part]), strict=True))
            failed |= {key: item for key, item in found.items() if math.isnan(item.harmfulness)}
            self._write({key: item for key, item in found.items() if key not in failed})
        # Read back: where two workers asked the same, both go by what was written first.
        known = self._read(keys) | failed
        self.models |= {item.model for item in known.values() if item.model is not None}
        return {"harmfulness": [known[key].harmfulness for key in keys]}

    def _ask(self, asked: Sequence[Conversation]) -> list[Answered]:
        if self._session is None:
            self._session = self.judge.open(device=self.device)
        found = self._session.ask(asked)
        for item in found:
            assert math.isnan(item.harmfulness) or 0 <= item.harmfulness <= 1, f"{self.name}: outside of [0, 1]"
        return [Answered(harmfulness=round(item.harmfulness, DIGITS), model=item.model) for item in found]

    def _read(self, keys: Sequence[str]) -> dict[str, Answered]:
        wanted = sorted(set(keys))
        found: dict[str, Answered] = {}
        with self._connection() as connection:
            for begin in range(0, len(wanted), 500):
                part = wanted[begin : begin + 500]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, score, model FROM scores WHERE key IN ({marks})", part)
                found |= {key: Answered(harmfulness=score, model=model) for key, score, model in rows}
        return found

    def _write(self, found: dict[str, Answered]) -> None:
        rows = [(key, item.harmfulness, item.model) for key, item in found.items()]
        with self._connection() as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL, model TEXT)")
            yield connection
