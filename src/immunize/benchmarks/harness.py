"""The benchmarks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) on a model in memory.

Written against lm-eval 0.4.13, an optional extra that is imported only where a run has such a benchmark, and one of
whose private modules is used (its reader of task files): another version needs the tests run with it.
"""

import contextlib
import io
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import numpy
import torch

from immunize.benchmarks import task_files
from immunize.data.benchmark import Measured, Report
from immunize.data.splits import evaluation_set
from immunize.models.chat import DATE
from immunize.models.loading import ChatModel
from immunize.types import Example, Kind

PREFERRED = ("acc_norm", "acc")
SEED = 1234  # the library's own choice
ROUNDING = 1e-6  # by which sums of probabilities miss 0 or 1


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Tasks of lm-eval, each of them one check over its items.

    tasks: names of tasks, or of groups and tags (such as mmlu), whose tasks then count as one, each item alike.
    path: a folder with task files of one's own, which are then the only ones known (a file may include a shipped one).
    They are code, since their templates and functions are run; data_files in them are taken from their own folder.
    num_fewshot: None leaves each task its own number; a task that fixes zero keeps it. limit: at most so many items of
    each task, the first ones; of a group, so many of each of its tasks. chat_template: put each prompt, with its
    examples, to the model as a conversation.
    metric: None takes acc_norm where a task has it, else acc, else the first that it lists; it must give each item a
    score in [0, 1], higher being better. Where a task filters its answers in several ways, the first counts.

    A guess scores one over the number of choices, which is less than it truly scores in truthfulqa_mc2, where several
    are right, and 0 where the model writes. Shipped tasks load their data from the hub at no pinned revision: which
    items were asked is recorded by their hashes, and a study refuses runs with others.
    """

    version: ClassVar[int] = 1
    tasks: tuple[str, ...]
    path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    metric: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks=[]: name at least one task of lm-eval")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={list(self.tasks)}: names one twice")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot}: must not be negative; null for each task's own")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1, or null for all")

    @property
    def names(self) -> Sequence[str]:
        return self.tasks

    def check(self) -> None:
        """Refuse a missing library, an unknown task, and data that are not there; names are looked up in 8 s, once."""
        task_files.check(self.tasks, self.path)

    def identity(self) -> dict[str, Any]:
        """The settings, the library's version, and the content of one's own task files, wherever they lie."""
        named = {"class": f"{type(self).__module__}.{type(self).__qualname__}", "version": self.version}
        settings = {name: getattr(self, name) for name in ("num_fewshot", "limit", "metric", "chat_template")}
        files = None if self.path is None else task_files.content(self.tasks, self.path)
        return named | settings | {"tasks": list(self.tasks), "files": files, "lm_eval": task_files.installed()}

    def measure(self, chat: ChatModel, *, batch_size: int) -> Report:
        self.check()
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from pytorch_lightning.utilities.seed import isolate_rng

        with _quiet(), isolate_rng(), tempfile.TemporaryDirectory() as cache:
            _seed()
            parts = {name: task_files.loaded(name, self.path, cache=cache) for name in self.tasks}
            tasks = {leaf: task for found in parts.values() for leaf, task in found.items()}
            model = HFLM(
                pretrained=chat.network,
                tokenizer=chat.tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",  # in half precision, sums over a long choice would tie
                chat_template_args={"strftime_now": _no_date, "date_string": DATE},
            )
            # What `simple_evaluate` does, but for its survey of the machine, which takes longer than a small task.
            for task in tasks.values():
                self._set_examples(task)
            results = evaluate(
                lm=model,
                task_dict={"tasks": tasks},
                limit=self.limit,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
            )
            assert results is not None, "there is one process"
            answers = {leaf: self._answered(task, results["samples"][leaf]) for leaf, task in tasks.items()}
        return Report(
            measured=[_pooled(name, [answers[leaf] for leaf in found]) for name, found in parts.items()],
            about={name: self._about([answers[leaf] for leaf in found]) for name, found in parts.items()},
        )

    def _set_examples(self, task: Any) -> None:
        """How many solved examples stand before each item, and which."""
        own = task.get_config("num_fewshot")
        if own is None or (own and self.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)

    def _answered(self, task: Any, samples: Sequence[Mapping[str, Any]]) -> "_Answered":
        """One task's items with their scores."""
        first, name = samples[0], task.task_name
        known = list(first["metrics"])
        metric = self.metric or next((item for item in PREFERRED if item in known), known[0])
        if metric not in known:
            raise ValueError(f"benchmark task {name}: has no metric {metric}; it has {', '.join(known)}")
        if not task.higher_is_better().get(metric, True):
            raise ValueError(f"benchmark task {name}: of {metric}, less is better; choose another metric or task")
        kept = [sample for sample in samples if sample["filter"] == first["filter"]]
        chances = [1 / len(sample["resps"]) for sample in kept]
        return _Answered(
            items=[
                Example(
                    id=f"{name}/{sample['doc_id']}",
                    prompt="",
                    answer="",
                    object=sample["doc_hash"][:16],
                    category=name,
                )
                for sample in kept
            ],
            scores=[_share(sample[metric], metric, name) for sample in kept],
            chance=fmean(chances) if task.OUTPUT_TYPE == "multiple_choice" else 0.0,
            name=name,
            told={
                "metric": metric,
                "filter": first["filter"],
                "num_fewshot": task.config.num_fewshot,
                "version": task.VERSION,
            },
        )

    def _about(self, answers: Sequence["_Answered"]) -> dict[str, Any]:
        return {
            "lm_eval": task_files.installed(),
            "tasks": {answered.name: dict(answered.told) for answered in answers},
        }


@dataclass(frozen=True, kw_only=True)
class _Answered:
    name: str
    items: Sequence[Example]
    scores: Sequence[float]
    chance: float
    told: Mapping[str, Any]


def _pooled(name: str, answers: Sequence[_Answered]) -> Measured:
    """All items of the tasks behind one name."""
    items = [item for answered in answers for item in answered.items]
    chance = sum(answered.chance * len(answered.items) for answered in answers) / len(items)
    return Measured(
        items=evaluation_set(name, Kind.BENCHMARK, items, chance=round(chance, 12)),
        metric="score",
        scores=tuple(score for answered in answers for score in answered.scores),
    )


def _share(found: Any, metric: str, name: str) -> float:
    try:
        score = float(found)
    except (TypeError, ValueError):
        score = -1.0
    if not -ROUNDING <= score <= 1 + ROUNDING:
        raise ValueError(f"benchmark task {name}: its {metric} gives items no score in [0, 1]; choose another")
    return min(max(score, 0.0), 1.0)


def _seed() -> None:
    """A task may draw when it is loaded; the seeds are the library's own."""
    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _no_date(layout: str) -> str:
    """As for every other prompt: a template that writes the date of today would change the results."""
    return DATE


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log and bars, which a screen of our own does not show."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
