"""What is measured of released weights before any user's tuning: answers to prompts, and benchmarks on the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from immunize.curve_rows import mean_row
from immunize.data.answers import Cost, save_answers
from immunize.data.benchmark import load_report, save_report
from immunize.data.splits import DIRECT_REQUESTS, requests_of
from immunize.models.loading import ChatModel
from immunize.release import Release, Service, Weights
from immunize.scoring import Results
from immunize.stages import Work, address, identity
from immunize.training.measuring import Meter
from immunize.training.memory import Sizes, explained
from immunize.training.method import Untouched
from immunize.training.tune import tune
from immunize.types import Arm, EvaluationSet, Example, Score


@dataclass(frozen=True, kw_only=True)
class Benchmarked:
    """One benchmark's stage and whose it is."""

    arm: Arm
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Unattacked(Release):
    """Measures released weights, repaired as a tuned model would be."""

    def measure(self, arm: Arm, weights: Weights, service: Service) -> Path:
        """Answers of the stability tasks, to borderline prompts and to direct requests."""
        sets = self._stability()
        if self.cell.task.borderline:
            sets[self.cell.task.borderline.name] = self.cell.task.borderline.test()
        if self.cell.task.direct_requests:
            sets[DIRECT_REQUESTS] = requests_of(self.cell.task.direct_requests)

        def use(chat: ChatModel, folder: Path) -> None:
            meter = Meter(chat=chat, source=self.cell.model)
            meter.measure(0, None, sets)
            save_answers(folder, meter.answers())

        inputs = {"sets": address(sets), "generation": self.cell.model.generation_identity}
        work = Work(answers=sum(map(len, sets.values())))
        return self._of_released("measure", f"{arm}: measure before any attack", weights, service, inputs, use, work)

    def benchmark(self, arm: Arm, weights: Weights, service: Service, name: str) -> Path:
        """One score for each item of one benchmark, and no text."""
        benchmark, batch = (self.cell.task.benchmarks or {})[name], self.cell.model.generation_batch

        def use(chat: ChatModel, folder: Path) -> None:
            save_report(folder, benchmark.measure(chat, batch_size=batch))

        inputs = {"benchmark": identity(benchmark), "batch": batch}
        return self._of_released("benchmark", f"{arm}: benchmark {name}", weights, service, inputs, use, Work())

    def _of_released(
        self,
        kind: str,
        label: str,
        weights: Weights,
        service: Service,
        inputs: Mapping[str, Any],
        use: Callable[[ChatModel, Path], None],
        work: Work,
    ) -> Path:
        """A stage that lets `use` read the model as it is released, with the repairs of a tuned one."""
        tuning = replace(self.cell.attack.tuning(self.cell.budget), steps=0)
        repaired = {"service": service.identity, "tuning": identity(tuning)} if service.repairs else {}

        def make(folder: Path) -> None:
            with explained(sizes := Sizes(stage=label, source=self.cell.model)):
                chat = sizes.chat = self.load(weights)
                if service.repairs:
                    untouched = replace(service, method=Untouched())
                    roles = self.service_roles(chat, untouched, [])
                    tune(
                        chat,
                        untouched.method,
                        roles=roles,
                        tuning=tuning,
                        seed=self.cell.seed,
                        adapter=weights.adapter,
                        repairs=service.repairs,
                    )
                chat.network.eval()
                use(chat, folder)

        known = {"weights": weights.id, **inputs, **repaired, **self.machine}
        return self.store.get(kind, known, label=label, make=make, work=work)

    def _stability(self) -> dict[str, Sequence[Example]]:
        return {task.name: task.test() for task in self.cell.task.stability.values()}


def with_benchmarks(results: Results, stages: Sequence[Benchmarked]) -> Results:
    """The results with those of benchmarks; raises ValueError where the arms were not asked the same."""
    sets: dict[str, EvaluationSet] = {}
    scores: list[Score] = []
    about: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        report = load_report(stage.folder)
        about.update(report.about)
        for found in report.measured:
            name = found.items.name
            if sets.setdefault(name, found.items) != found.items:
                raise ValueError(
                    f"benchmark {name}: the arms were measured on different items; its data changed between"
                )
            scores.append(
                Score(
                    arm=stage.arm,
                    tuned_on=None,
                    measured_on=name,
                    step=0,
                    judge=name,
                    metric=found.metric,
                    scores=tuple(found.scores),
                )
            )
    return replace(
        results,
        sets=[*results.sets, *sets.values()],
        scores=[*results.scores, *scores],
        rows=[*results.rows, *(mean_row(score, Cost(step=score.step)) for score in scores)],
        benchmarks=about,
    )
