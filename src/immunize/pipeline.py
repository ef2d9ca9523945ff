"""One run, from top to bottom: prepare -> measure -> attack -> train -> score -> check.

Every step is a memoised stage; nothing here is done twice, in this run or in any other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from immunize.before import Benchmarked, Unattacked, with_benchmarks
from immunize.data.answers import save_answers
from immunize.data.domain import TrainedTask
from immunize.data.mixture import Counts, count, load_counts, save_counts
from immunize.data.splits import DIRECT_REQUESTS, Exposure, evaluation_set, exposures, requests_of, task_set
from immunize.models import adapters
from immunize.release import Service, Weights
from immunize.scoring import Measurement, Results, request, score
from immunize.stages import BusyError, Work, address, identity
from immunize.training.budget import measured_steps
from immunize.training.measuring import Meter
from immunize.training.memory import Sizes, explained
from immunize.training.tuning import Tuning
from immunize.types import Arm, EvaluationSet, Example, Kind


@dataclass(frozen=True, kw_only=True)
class Pipeline(Unattacked):
    """Runs one cell. `progress(step, steps)` is called while a model is tuned."""

    def run(self) -> Results:
        """Both arms through all stages; the scores come in the order of the stages."""
        found = self._measured()
        measurements = [item for item in found if isinstance(item, Measurement)]
        results = score(measurements, sets=self.evaluation_sets, **self._scoring)
        results = with_benchmarks(results, [item for item in found if isinstance(item, Benchmarked)])
        return replace(results, mixtures=self._mixtures(measurements))

    def request(self) -> None:
        """Ask the store for every stage of `run` and read none: for a store that only plans."""
        request([item for item in self._measured() if isinstance(item, Measurement)], **self._scoring)

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"cell": self.cell, "exposures": self.exposures, "store": self.store, "machine": self.machine}

    def _measured(self) -> list[Measurement | Benchmarked]:
        """Every stage that measures. What another worker holds is left for later, and the rest done first."""
        found: list[Measurement | Benchmarked] = []
        busy: BusyError | None = None
        for arm in (Arm.CONTROL, Arm.DEFENDED) if self.cell.defense else (Arm.CONTROL,):
            try:
                weights = self.prepare(arm)
                service = self.service(arm, weights)
            except BusyError as error:
                busy = error
                continue
            for stage in self._stages(arm, weights, service):
                try:
                    found.append(stage())
                except BusyError as error:
                    busy = error
        if busy is not None:
            raise busy
        return found

    def _stages(
        self, arm: Arm, weights: Weights, service: Service
    ) -> Sequence[Callable[[], Measurement | Benchmarked]]:
        """What is done with the weights of one arm, in this order: benchmarks may be refused by a model, so early."""
        mixed = None if self.cell.attack.task is None else self.cell.attack.task.name

        def answered(tuned_on: str | None, stage: Callable[[], Path]) -> Measurement:
            return Measurement(arm=arm, tuned_on=tuned_on, folder=stage(), mixed=mixed)

        def benchmarked(name: str) -> Benchmarked:
            return Benchmarked(arm=arm, folder=self.benchmark(arm, weights, service, name))

        trained = self.cell.task.trainability.values()
        tunings = {
            **{item.name: partial(self.attack, arm, weights, service, item) for item in self.exposures},
            **{item.task.name: partial(self.train, arm, weights, service, item) for item in trained},
        }
        return [
            partial(answered, None, partial(self.measure, arm, weights, service)),
            *(partial(benchmarked, name) for name in self.cell.task.benchmarks or {}),
            *(partial(answered, tuned_on, stage) for tuned_on, stage in tunings.items()),
        ]

    @cached_property
    def exposures(self) -> list[Exposure]:
        return exposures(self.cell.data, self.cell.split)

    @cached_property
    def drawn(self) -> dict[str, dict[str, int]]:
        """Per exposure, how many samples the attack draws and how many of them are distinct."""
        samples = {item.name: self._samples(item) for item in self.exposures}
        return {
            name: {"samples": len(found), "distinct": len({example.id for example in found})}
            for name, found in samples.items()
        }

    def _mixtures(self, measurements: Sequence[Measurement]) -> dict[str, Counts]:
        """Per exposure that mixes harm with a benign task, how many samples and tokens each of the two has."""
        control = {item.tuned_on: item.folder for item in measurements if item.arm is Arm.CONTROL}
        mixed = self.exposures if self.cell.attack.task is not None else []
        return {item.name: load_counts(control[item.name]) for item in mixed}

    def _samples(self, exposure: Exposure) -> list[Example]:
        return self.cell.attack.samples(exposure.attack, budget=self.cell.budget, seed=self.cell.seed)

    @cached_property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """Every set that is measured, without text; those of benchmarks are known when they have been measured."""
        tasks, mixed, requests = self.cell.task, self.cell.attack.task, self.cell.task.direct_requests
        trained = [*([mixed] if mixed is not None else []), *(item.task for item in tasks.trainability.values())]
        return [
            *(exposure.evaluation_set() for exposure in self.exposures),
            *(task_set(task, Kind.STABILITY) for task in tasks.stability.values()),
            *([task_set(tasks.borderline, Kind.BORDERLINE)] if tasks.borderline else []),
            *([evaluation_set(DIRECT_REQUESTS, Kind.REQUESTS, requests_of(requests))] if requests else []),
            *(task_set(task, Kind.TRAINABILITY) for task in trained),
        ]

    def attack(self, arm: Arm, weights: Weights, service: Service, exposure: Exposure) -> Path:
        """Tuning under the budget; answers on the way, and the stability tasks at the last step (or at every one).

        The benign task of a mixture is measured beside the harm, in the first exposure.
        """
        attack, budget = self.cell.attack, self.cell.budget
        evaluation: dict[str, Sequence[Example]] = {exposure.name: exposure.evaluation}
        if attack.task is not None and exposure.name == self.exposures[0].name:
            evaluation[attack.task.name] = attack.task.test()
        guarded = {**evaluation, **self._stability()}
        every_step = self.cell.conditions.guard_every_step
        return self._tuned(
            "attack",
            f"{arm}: attack {exposure.name}",
            weights,
            service,
            tuning=attack.tuning(budget),
            examples=self._samples(exposure),
            harmful=frozenset(example.id for example in exposure.attack),
            measurements=budget.measurements,
            sets_at=lambda step: guarded if every_step or step == budget.steps else evaluation,
            extra={"attack": identity(attack), "guard_every_step": every_step},
            keep_weights=attack.keep_weights,
        )

    def train(self, arm: Arm, weights: Weights, service: Service, trained: TrainedTask) -> Path:
        """Benign tuning under the task's own rate, steps, optimizer and trainable set."""
        task = trained.task
        items = {task.name: task.test()}
        return self._tuned(
            "train",
            f"{arm}: train {task.name}",
            weights,
            service,
            tuning=trained.tuning(),
            examples=task.train(),
            harmful=frozenset(),
            measurements=trained.measurements,
            sets_at=lambda step: items,
            extra={},
        )

    def _tuned(
        self,
        kind: str,
        label: str,
        weights: Weights,
        service: Service,
        *,
        tuning: Tuning,
        examples: list[Example],
        harmful: frozenset[str],
        measurements: int,
        sets_at: Callable[[int], Mapping[str, Sequence[Example]]],
        extra: Mapping[str, Any],
        keep_weights: bool = False,
    ) -> Path:
        steps = measured_steps(tuning.steps, measurements=measurements)
        inputs = {
            "weights": weights.id,
            "tuning": identity(tuning),
            "examples": address(examples),
            "measured": [steps, address([sets_at(step) for step in (steps[0], steps[-1])])],
            **extra,
            **({"service": service.identity} if service.identity else {}),
            "seed": self.cell.seed,
            "generation": self.cell.model.generation_identity,
            **self.shared_machine(tuning),
        }

        def make(folder: Path) -> None:
            sizes = Sizes(stage=label, source=self.cell.model, tuning=tuning, processes=self.processes(tuning))
            with explained(sizes):
                chat = sizes.chat = self.load(weights)
                meter = Meter(chat=chat, source=self.cell.model)
                roles = sizes.roles = self.service_roles(chat, service, examples)
                main = roles["main"]
                assert not isinstance(main, tuple), "the user's examples are no pairs"
                self.tune(
                    chat,
                    service.method,
                    folder=folder,
                    weights=weights,
                    roles=roles,
                    tuning=tuning,
                    memory=meter,
                    repairs=service.repairs,
                    measure=lambda step, spent: meter.measure(step, spent, sets_at(step)),
                    measured_steps=steps,
                )
                save_answers(folder, meter.answers())
                save_counts(folder, count(examples, main, harmful=harmful))
                if keep_weights:
                    adapters.merge(chat)
                    chat.save(folder / "weights")

        answers = sum(len(examples) for step in steps for examples in sets_at(step).values())
        work = Work(
            steps=tuning.steps, batch_size=tuning.batch_size, passes=service.passes, pairs=examples, answers=answers
        )
        return self.store.get(kind, inputs, label=label, make=make, work=work)
