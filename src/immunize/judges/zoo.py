"""The judges of the library judgezoo (HarmBench, Llama-Guard, StrongREJECT and others) through one adapter.

Written against its documented interface, `Judge.from_name(NAME)(conversations) -> {"p_harmful": [...]}`: `base.py` of
release 0.1.9 was read, and the library was not run for this adapter. It loads weights by name, at no pinned revision,
so that the library's version is all that can be recorded. Those of its judges that ask a prompted model send prompts
and answers to a company's endpoint, unless the library's own settings name a local model.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

from immunize.judges.judge import Answered, Conversation, ModelJudge

LIBRARY = "judgezoo"


@dataclass(frozen=True, kw_only=True)
class Zoo(ModelJudge):
    """`judge` is the library's name for one of its judges, such as harmbench, llama_guard_3 or strong_reject.

    What the library gives as None, or outside of [0, 1], is missing.
    """

    version: ClassVar[int] = 1
    chunk: ClassVar[int] = 64
    judge: str

    def identity(self) -> dict[str, Any]:
        installed = metadata.version(LIBRARY) if _is_installed() else None
        named = {"class": f"{type(self).__module__}.{type(self).__qualname__}", "version": self.version}
        return named | {"name": self.name, "judge": self.judge, LIBRARY: installed}

    def check(self) -> None:
        if not _is_installed():
            raise ValueError(f"judge={self.judge}: needs {LIBRARY}; pip install 'immunize[{LIBRARY}]' brings it")

    def open(self, *, device: str) -> "_Session":
        self.check()
        return _Session(judge=importlib.import_module(LIBRARY).Judge.from_name(self.judge))


@dataclass(frozen=True, kw_only=True)
class _Session:
    judge: Any

    def ask(self, conversations: Sequence[Conversation]) -> list[Answered]:
        turns = [
            [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]
            for item in conversations
        ]
        found = self.judge(turns)["p_harmful"]
        if len(found) != len(turns):
            raise ValueError(f"{LIBRARY}: gave {len(found)} scores for {len(turns)} conversations")
        return [Answered(harmfulness=_score(value)) for value in found]


def _score(value: Any) -> float:
    score = math.nan if value is None else float(value)
    return score if 0 <= score <= 1 else math.nan


def _is_installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None
