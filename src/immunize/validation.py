"""What must hold between the parts of a configuration: each part alone is validated by its own constructor."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from immunize.data.splits import (
    DIRECT_REQUESTS,
    Exposure,
    check_task,
    defense_examples,
    exposures,
    refuse_leakage,
    requests_of,
)
from immunize.judges.judge import ModelJudge
from immunize.training.role_names import ROLES
from immunize.training.tuning import Tuning

OVER_REFUSAL = "over_refusal"  # a check of that name would be two

if TYPE_CHECKING:
    from immunize.config import Cell


def validate(cell: "Cell") -> None:
    """Raise ValueError, with one line that names the key and what would be right; data files are read for it."""
    _check_model(cell)
    for name, defense in cell.defense.items():
        cell.threat.admit(name, defense)
    found = exposures(cell.data, cell.split)
    _check_stages(cell)
    _check_roles(cell)
    _check_control(cell)
    _check_micro_batch(cell)
    _check_devices(cell)
    _check_adapter(cell)
    _check_quantized(cell)
    _check_judges(cell, found)
    _check_tasks(cell, found)
    _check_requests(cell)
    _check_benchmarks(cell, found)
    _check_figure(cell)


def _check_model(cell: "Cell") -> None:
    try:
        cell.model.check_chat()
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _check_stages(cell: "Cell") -> None:
    training = list(cell.at_stage("finetuning"))
    if len(training) > 1:
        raise ValueError(f"defense.{training[1]}: {training[0]} makes the steps of the user's tuning already")
    starting = [name for name, defense in cell.at_stage("alignment").items() if getattr(defense, "starts_over", False)]
    if starting and starting[0] != next(iter(cell.at_stage("alignment"))):
        raise ValueError(f"defense.{starting[0]}: must come first, since it replaces what the others have made")


def _check_control(cell: "Cell") -> None:
    if cell.control == "safety_sft" and not any(item.tuning.steps for item in cell.at_stage("alignment").values()):
        raise ValueError("control=safety_sft: takes as many steps as the defense, and this one has none")
    roles = {role for defense in cell.defense.values() for role in defense.roles}
    if "retain" in roles and cell.task.retain is None:
        raise ValueError("task.retain: the defense needs benign conversations, and no task is named for them")


def _check_micro_batch(cell: "Cell") -> None:
    try:
        cell.attack.tuning(cell.budget)
    except ValueError as error:
        raise ValueError(f"attack: {error}") from error


def _check_devices(cell: "Cell") -> None:
    """Every tuning must leave each device as much of a batch as the others."""
    tunings = {"attack": cell.attack.tuning(cell.budget)}
    tunings |= {f"task.trainability.{name}": item.tuning() for name, item in cell.task.trainability.items()}
    tunings |= {f"defense.{name}.tuning": item.tuning for name, item in cell.at_stage("alignment").items()}
    for name, defense in cell.at_stage("post").items():
        tunings |= {f"defense.{name}.{key}_tuning": twin.tuning for key, twin in defense.artifacts.items()}
    for key, tuning in tunings.items():
        try:
            if tuning.steps:
                tuning.shared_micro_batches(cell.runtime.devices)
        except ValueError as error:
            raise ValueError(f"runtime.devices={cell.runtime.devices}: {key}: {error}") from error


def _check_adapter(cell: "Cell") -> None:
    """A continued adapter is the defense's own; the control starts one like it, or the arms would not be comparable."""
    wanted = cell.attack.trainable
    if getattr(wanted, "adapter", None) != "continued":
        return
    aligned = cell.at_stage("alignment")
    if not aligned:
        return
    name, defense = list(aligned.items())[-1]
    if not hasattr(defense.tuning.trainable, "adapter"):
        raise ValueError(
            "attack.trainable.adapter=continued: the defense trains no adapter to continue; choose fresh, or "
            f"trainable@defense.{name}.tuning.trainable=lora"
        )
    if replace(wanted, adapter="fresh") != replace(defense.tuning.trainable, adapter="fresh"):
        raise ValueError(
            "attack.trainable.adapter=continued: rank, alpha, dropout and targets must be those of the defense's "
            f"adapter, {defense.tuning.trainable}"
        )


def _check_quantized(cell: "Cell") -> None:
    """A rounded base cannot be released or edited: what was trained over it is measured as it is."""
    for name, defense in cell.at_stage("alignment").items():
        if getattr(defense.tuning.trainable, "quantized", None) is not None:
            raise ValueError(
                f"defense.{name}.tuning.trainable.quantized: only an attack or a benign tuning may have it"
            )
    if not any(getattr(tuning.trainable, "quantized", None) for tuning in _user_tunings(cell)):
        return
    if cell.attack.keep_weights:
        raise ValueError("attack.keep_weights=true: weights of 4 bits are not kept; choose trainable=lora")
    post = list(cell.at_stage("post"))
    if post:
        raise ValueError(
            f"defense.{post[0]}: cannot edit weights of 4 bits; choose trainable=lora for the user's tuning"
        )


def check_hardware(cell: "Cell", device: str) -> None:
    """Raise ValueError where the run asks for a library or a device that is not here."""
    if device == "cuda" and cell.runtime.devices > 1:
        import torch

        if cell.runtime.devices > (there := torch.cuda.device_count()):
            raise ValueError(f"runtime.devices={cell.runtime.devices}: torch sees {there} GPU{'s' * (there != 1)} here")
    wanted = []
    for tuning in (*_user_tunings(cell), *(item.tuning for item in cell.at_stage("alignment").values())):
        if tuning.optimizer.name == "adamw_8bit":
            wanted.append("optimizer.name=adamw_8bit")
        if getattr(tuning.trainable, "quantized", None) is not None:
            wanted.append("trainable.quantized=nf4")
    if wanted and find_spec("bitsandbytes") is None:
        raise ValueError(f"{wanted[0]}: needs bitsandbytes, which is not installed; pip install 'immunize[quantized]'")
    if wanted and device != "cuda":
        raise ValueError(f"{wanted[0]}: needs a GPU, and this run is on the processor; choose adamw and trainable=lora")


def _user_tunings(cell: "Cell") -> list[Tuning]:
    return [cell.attack.tuning(cell.budget), *(item.tuning() for item in cell.task.trainability.values())]


def _check_judges(cell: "Cell", found: Sequence[Exposure]) -> None:
    """Every judge is asked about one reference answer of each exposure, and of direct requests.

    One that asks a model is asked whether it could.
    """
    names = [judge.name for judge in cell.judge.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"judge: the names of judges must differ, and these are {', '.join(names)}")
    asked = [exposure.evaluation[:1] for exposure in found]
    if cell.task.direct_requests is not None:
        asked.append(requests_of(cell.task.direct_requests)[:1])
    for key, judge in cell.judge.items():
        for examples in asked:
            try:
                if isinstance(judge, ModelJudge):
                    judge.check()
                    continue
                judge.measure(examples, [example.answer for example in examples])
            except ValueError as error:
                raise ValueError(f"judge.{key}: {error}") from error


def _check_tasks(cell: "Cell", found: Sequence[Exposure]) -> None:
    mixed = [] if cell.attack.task is None else [cell.attack.task]
    if mixed and mixed[0].name in (task.name for task in cell.task.all()):
        raise ValueError(
            f"attack.task: {mixed[0].name} is a task of its own already; choose task=service, which leaves "
            "trainability to the user's task, or another attack.task"
        )
    for task in [*cell.task.all(), *mixed]:
        check_task(task)
        if task.name in (DIRECT_REQUESTS, *(exposure.name for exposure in found)):
            raise ValueError(f"task: the name {task.name} is that of an exposure or of the direct requests")
        if cell.task.retain is not None:
            refuse_leakage(f"task.retain (measured by task {task.name})", cell.task.retain.train(), task.test())
    for task in [*(entry.task for entry in cell.task.trainability.values()), cell.task.retain, *mixed]:
        if task is not None and not task.train():
            raise ValueError(f"task {task.name}: has nothing to train on, and can only be measured")
    for exposure in found if cell.task.retain is not None else ():
        refuse_leakage(
            f"task.retain (measured in exposure {exposure.name})", cell.task.retain.train(), exposure.evaluation
        )


def _check_requests(cell: "Cell") -> None:
    """Nothing of what is asked directly was trained on by the defense."""
    if cell.task.direct_requests is None:
        return
    asked = requests_of(cell.task.direct_requests)
    if not asked:
        raise ValueError("task.direct_requests: has no requests")
    refuse_leakage("the defense (measured on task.direct_requests)", defense_examples(cell.data), asked)
    if cell.task.retain is not None:
        refuse_leakage("task.retain (measured on task.direct_requests)", cell.task.retain.train(), asked)


def _check_benchmarks(cell: "Cell", found: Sequence[Exposure]) -> None:
    """Every benchmark could be measured here, and has a name of its own."""
    taken = {DIRECT_REQUESTS, OVER_REFUSAL, *(exposure.name for exposure in found)}
    taken |= {task.name for task in [*cell.task.all(), cell.attack.task] if task is not None}
    for key, benchmark in (cell.task.benchmarks or {}).items():
        try:
            benchmark.check()
        except ValueError as error:
            raise ValueError(f"task.benchmarks.{key}.{error}") from error
        for name in benchmark.names:
            if name in taken:
                raise ValueError(f"task.benchmarks.{key}: the name {name} is that of a task or another benchmark")
            taken.add(name)


def _check_figure(cell: "Cell") -> None:
    complete = cell.task.stability and cell.task.trainability and cell.conditions.guard_every_step
    if cell.figure == "paper_figure_2" and not complete:
        raise ValueError(
            "figure=paper_figure_2: needs a stability task, a trainability task and conditions.guard_every_step=true; "
            "experiment=immunization_demo has all of them"
        )


def _check_roles(cell: "Cell") -> None:
    for name, defense in cell.defense.items():
        known = (*ROLES, "main") if defense.stage == "finetuning" else ROLES
        unknown = [role for role in defense.roles if role not in known]
        if unknown:
            raise ValueError(f"defense.{name}: needs the data role {unknown[0]!r}; there are {', '.join(ROLES)}")
        unpaired = [example.id for example in defense_examples(cell.data) if example.refusal is None]
        if unpaired and {"refusals", "paired"} & set(defense.roles):
            raise ValueError(
                f"defense.{name}: needs refusals, and {len(unpaired)} examples of data have none, first {unpaired[0]}"
            )
