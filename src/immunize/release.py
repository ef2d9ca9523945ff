"""What is released: the model with its alignment-stage defenses, and what the provider makes beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from immunize.config import Cell
from immunize.data.splits import defense_examples
from immunize.defenses.safety_sft import SafetySFT
from immunize.models import adapters
from immunize.models.loading import ChatModel, load_tuned
from immunize.stages import CHECKPOINT, StageStore, Work, address, identity
from immunize.training import ENGINE_VERSION
from immunize.training.checkpoints import Checkpoints, Memory
from immunize.training.defense import PostDefense, UnsafeTwin
from immunize.training.memory import Sizes, explained
from immunize.training.method import Method
from immunize.training.parallel import Instructions, shared
from immunize.training.roles import encode_pairs, encode_roles
from immunize.training.tune import Repair, Roles, tune
from immunize.training.tuning import Tuning
from immunize.types import Arm, Example


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one arm: the model as it is, or a stage's folder; `id` says what they are."""

    id: str
    folder: Path | None = None

    @property
    def tuned(self) -> Path | None:
        """The folder of weights that a stage left, if one did."""
        return None if self.folder is None else self.folder / "weights"

    @property
    def adapter(self) -> Path | None:
        """The adapter that the last defense left beside the merged weights, if it trained one."""
        found = None if self.folder is None else self.folder / "adapter"
        return found if found is not None and found.is_dir() else None


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the provider does to a user's tuning: the method that trains, and the repairs of the tuned model.

    `identity` holds all that determines it; it is empty where nothing is done.
    """

    method: Method
    repairs: tuple[Repair, ...] = ()
    identity: Mapping[str, Any]

    @property
    def passes(self) -> float:
        return getattr(self.method, "passes", 1)


@dataclass(frozen=True, kw_only=True)
class Release:
    """Makes the weights of each arm of one cell, as stages. `progress(step, steps)` is called while tuning."""

    cell: Cell
    store: StageStore
    device: str
    progress: Callable[[int, int], None] = lambda step, steps: None

    @property
    def machine(self) -> dict[str, Any]:
        """What changes the bits of every stage that runs a model: the engine, and what it runs on."""
        runtime = self.cell.runtime
        masters = {} if self.cell.model.dtype == "float32" else {"masters": "float32"}
        common = {"engine": ENGINE_VERSION, "threads": runtime.threads, "device": self.device, "world_size": 1}
        return {**common, **masters}

    def shared_machine(self, tuning: Tuning) -> dict[str, Any]:
        """`machine` of a stage that tunes, whose steps all processes share."""
        return {**self.machine, "world_size": self.processes(tuning)}

    def processes(self, tuning: Tuning) -> int:
        return self.cell.runtime.devices if tuning.steps else 1

    def load(self, weights: Weights) -> ChatModel:
        return load_tuned(self.cell.model, weights.tuned, device=self.device)

    def tune(
        self,
        chat: ChatModel,
        method: Method,
        *,
        folder: Path,
        weights: Weights,
        roles: Roles,
        tuning: Tuning,
        memory: Memory | None = None,
        **alone: Any,
    ) -> None:
        """`tune` for the stage that is made in `folder`, on all devices of the run.

        `memory` and `alone` are for this process, the first: what it remembers, repairs and measures.
        """
        runtime = self.cell.runtime
        kept = None
        if runtime.checkpoint_minutes is not None:
            kept = Checkpoints(folder=folder / CHECKPOINT, minutes=runtime.checkpoint_minutes, memory=memory)
        common: dict[str, Any] = {
            "tuning": tuning,
            "seed": self.cell.seed,
            "adapter": weights.adapter,
            "gradient_checkpointing": runtime.gradient_checkpointing,
        }
        peers = Instructions(
            source=self.cell.model,
            folder=weights.tuned,
            threads=runtime.threads,
            arguments={
                "method": method,
                "roles": {role: roles[role] for role in method.roles},
                "checkpoints": None if kept is None else kept.read_only(),
                **common,
            },
        )
        with shared(peers, processes=self.processes(tuning), device=chat.device) as part:
            tune(chat, method, roles=roles, checkpoints=kept, progress=self.bar(tuning), **common, **alone, **part)

    def bar(self, tuning: Tuning) -> Callable[[int], None]:
        return lambda step: self.progress(step, tuning.steps)

    def prepare(self, arm: Arm) -> Weights:
        """The weights that are released: each alignment-stage defense on those of the one before."""
        weights = Weights(id=address(self.cell.model.weights_identity))
        defenses = self.cell.at_stage("alignment") if arm is Arm.DEFENDED else self._control_defense()
        for name, defense in defenses.items():
            weights = self._align(f"{arm}: prepare {name}", defense, weights)
        return weights

    def _control_defense(self) -> dict[str, Any]:
        if self.cell.control == "none":
            return {}
        trained = [defense for defense in self.cell.at_stage("alignment").values() if defense.tuning.steps]
        tuning = replace(trained[0].tuning, steps=sum(defense.tuning.steps for defense in trained))
        return {"safety_sft": SafetySFT(tuning=tuning, retain_weight=trained[0].retain_weight)}

    def _align(self, label: str, defense: Any, weights: Weights) -> Weights:
        pairs, retain = defense_examples(self.cell.data), self._retain(defense)
        inputs = {"defense": identity(defense), "data": address([identity(pairs), identity(retain)])}

        def make(chat: ChatModel) -> Roles:
            return encode_roles(chat, defense.roles, pairs=pairs, retain=retain)

        return self._made(label, defense, defense.tuning, weights, inputs, make, passes=defense.passes)

    def _made(
        self,
        label: str,
        method: Method,
        tuning: Tuning,
        weights: Weights,
        inputs: Mapping[str, Any],
        make_roles: Callable[[ChatModel], Roles],
        *,
        passes: float = 1,
    ) -> Weights:
        """The weights after tuning on the defender's data, as a stage."""
        inputs = {"weights": weights.id, **inputs, "seed": self.cell.seed, **self.shared_machine(tuning)}

        def make(folder: Path) -> None:
            sizes = Sizes(stage=label, source=self.cell.model, tuning=tuning, processes=self.processes(tuning))
            with explained(sizes):
                chat = sizes.chat = self.load(weights)
                roles = sizes.roles = make_roles(chat)
                self.tune(chat, method, folder=folder, weights=weights, roles=roles, tuning=tuning)
                if adapters.is_adapted(chat):
                    adapters.save_adapter(chat, folder / "adapter")
                    adapters.merge(chat)
                chat.save(folder / "weights")

        work = Work(
            steps=tuning.steps, batch_size=tuning.batch_size, passes=passes, pairs=defense_examples(self.cell.data)
        )
        folder = self.store.get("prepare", inputs, label=label, make=make, work=work)
        return Weights(id=address(inputs), folder=folder)

    def service(self, arm: Arm, weights: Weights) -> Service:
        """What is done to a user's tuning of `weights`; artifacts are made first."""
        defenses = self.cell.at_stage("finetuning", "post") if arm is Arm.DEFENDED else {}
        method, repairs, artifacts = Method(), list[Repair](), list[str]()
        for name, defense in defenses.items():
            if isinstance(defense, PostDefense):
                made = {
                    key: self._twin(f"{arm}: prepare {name}, {key} twin", twin, weights)
                    for key, twin in defense.artifacts.items()
                }
                artifacts += [twin.id for twin in made.values()]
                folders = {key: twin.folder for key, twin in made.items() if twin.folder is not None}
                repairs.append(Repair(method=defense, artifacts=folders))
            else:
                method = defense
        known: dict[str, Any] = {}
        if defenses:
            pairs, retain = defense_examples(self.cell.data), [self._retain(item) for item in defenses.values()]
            data = address([identity(pairs), identity(retain)])
            known = {"defenses": identity(list(defenses.values())), "data": data, "artifacts": artifacts}
        return Service(method=method, repairs=tuple(repairs), identity=known)

    def service_roles(self, chat: ChatModel, service: Service, examples: list[Example]) -> Roles:
        """The user's examples as `main`, and what the provider's defenses need beside them."""
        methods = [service.method, *(repair.method for repair in service.repairs)]
        needed = dict.fromkeys(role for method in methods for role in method.roles if role != "main")
        retain = self.cell.task.retain.train() if "retain" in needed else []
        own = encode_roles(chat, list(needed), pairs=defense_examples(self.cell.data), retain=retain)
        return {"main": encode_pairs(chat, examples), **own}

    def _twin(self, label: str, twin: UnsafeTwin, weights: Weights) -> Weights:
        pairs = defense_examples(self.cell.data)
        inputs = {"twin": identity(twin), "data": address(identity(pairs))}
        return self._made(
            label, Method(), twin.tuning, weights, inputs, lambda chat: {"main": encode_pairs(chat, pairs)}
        )

    def _retain(self, defense: Any) -> list[Example]:
        return self.cell.task.retain.train() if "retain" in defense.roles else []
