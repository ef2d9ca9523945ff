"""The root of the configuration: its schema, its resolvers, and `build`, the only place that instantiates."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from immunize.conditions.settings import Conditions
from immunize.instantiate import instantiate
from immunize.stages import address, identity
from immunize.types import TARGET
from immunize.validation import validate

CONFIG_MODULE = "immunize.conf"
CONFIG_NAME = "run"
HASHED = ("model", "threat", "attack", "budget", "data", "task", "split", "judge", "conditions")


@dataclass
class Schema:
    """The root keys and their types; inside a group the constructor of its `_target_` is the schema."""

    study: str = "default"
    seed: int = 0
    control: str = "none"
    figure: str = "curves"
    model: dict[str, Any] = field(default_factory=dict)
    defense: dict[str, Any] = field(default_factory=dict)
    threat: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run is executed; in no run's identity.

    root: where runs and stages land. threads: a constant, never derived from the machine, because another number of
    threads changes the last bits and would make every stage a new one. workers: how many of them Hydra's launcher
    starts for a sweep; each takes the cells that no other is at work on. checkpoint_minutes: a stage that trains for
    longer keeps a checkpoint, from which it goes on when it was killed; null for none. gradient_checkpointing: compute
    activations again in the backward pass, which saves memory, costs a third more time, and changes no bit. strategy:
    with `ddp`, as many processes as there are `devices` share each batch of a tuning, each with its own copy of the
    model; another number of them makes other stages.
    """

    root: str = "multirun"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    workers: int = 1
    progress: bool = True
    checkpoint_minutes: float | None = 10.0
    gradient_checkpointing: bool = False
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("threads", "workers", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.strategy == "fsdp":
            raise ValueError(
                "strategy=fsdp: is not supported yet; every device holds the whole model. micro_batch, "
                "gradient_checkpointing and LoRA make one fit, and runtime=ddp shares its batches among devices"
            )
        if self.strategy == "single" and self.devices > 1:
            raise ValueError(f"devices={self.devices}: strategy=single has one; choose runtime=ddp")
        if self.strategy == "ddp" and self.devices == 1:
            raise ValueError("devices=1: strategy=ddp shares a tuning among several; give runtime.devices=2 or more")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes < 0:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes}: must not be negative; null for none")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One resolved and validated configuration; what becomes one run."""

    study: str
    seed: int
    control: Literal["none", "safety_sft"]
    figure: Literal["curves", "paper_figure_2"]
    model: Any
    defense: Mapping[str, Any]
    threat: Any
    attack: Any
    budget: Any
    data: Any
    task: Any
    split: Any
    judge: Mapping[str, Any]
    conditions: Conditions
    runtime: Runtime
    tracking: Any
    config: Mapping[str, Any]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines this run's results; a defense in depth is a list, since its order matters."""
        parts = {name: identity(getattr(self, name)) for name in HASHED}
        parts["defense"] = [[name, identity(defense)] for name, defense in self.defense.items()]
        return parts | {"seed": self.seed, "control": self.control}

    @cached_property
    def run_id(self) -> str:
        return address(self.identity, digits=10)

    def at_stage(self, *stages: str) -> dict[str, Any]:
        """The defenses that act at one of `stages`, in their order."""
        return {name: defense for name, defense in self.defense.items() if defense.stage in stages}

    @property
    def root(self) -> Path:
        return Path(self.runtime.root)

    @property
    def folder(self) -> Path:
        return self.root / self.study / self.run_id


def register() -> None:
    """Make schema and resolvers known to Hydra; harmless when called twice."""
    ConfigStore.instance().store(name="schema", node=Schema)
    OmegaConf.register_new_resolver("user_conf", user_conf, replace=True)


def user_conf() -> str:
    """The user's own configurations: $IMMUNIZE_CONF, or ./conf, or nothing."""
    chosen = os.environ.get("IMMUNIZE_CONF")
    folder = Path(chosen) if chosen else Path("conf")
    if chosen and not folder.is_dir():
        raise ValueError(f"IMMUNIZE_CONF={chosen}: no such folder")
    own_checkout = Path(__file__).parents[2] / "conf"
    if not folder.is_dir() or folder.resolve() == own_checkout:
        return f"pkg://{CONFIG_MODULE}"
    return f"file://{folder.resolve()}"


def load(overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration outside of the command line."""
    register()
    with initialize_config_module(version_base="1.3", config_module=CONFIG_MODULE):
        return compose(config_name=CONFIG_NAME, overrides=list(overrides))


def choices(group: str) -> list[str]:
    """The shipped choices of a group."""
    register()
    with initialize_config_module(version_base="1.3", config_module=CONFIG_MODULE):
        loader = GlobalHydra.instance().config_loader()
        return list(loader.get_group_options(group))


def build(config: DictConfig, *, trusted: Sequence[str] | None = None) -> Cell:
    """Turn a composed configuration into frozen, validated objects.

    Raises ValueError with one line that names the key, what was given and what would be right. Nothing is loaded that
    takes long; data files are read, models are only looked at.
    """
    plain: Any
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from error
    unknown = sorted(set(plain) - {field.name for field in fields(Schema)})
    if unknown:
        raise ValueError(f"{unknown[0]}: no such key at the root of the configuration")
    parts: dict[str, Any] = {
        name: instantiate(plain[name], _ANNOTATIONS.get(name, object), key=name, trusted=trusted)
        for name in (
            "model",
            "threat",
            "attack",
            "budget",
            "data",
            "task",
            "split",
            "conditions",
            "runtime",
            "tracking",
        )
    }
    for name, node in plain["defense"].items():
        if TARGET not in node:
            raise ValueError(f"defense.{name}: keys of a defense that is not chosen; add defense={name} or drop them")
    for name in ("defense", "judge"):
        parts[name] = {
            key: instantiate(node, object, key=f"{name}.{key}", trusted=trusted) for key, node in plain[name].items()
        }
    for name, options in (("control", ("none", "safety_sft")), ("figure", ("curves", "paper_figure_2"))):
        parts[name] = instantiate(plain[name], Literal[options], key=name)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", plain["study"]):
        raise ValueError(f"study={plain['study']}: becomes a folder's name; letters, digits, '.', '_' and '-' only")
    if not parts["judge"]:
        raise ValueError("judge: choose at least one")
    cell = Cell(study=plain["study"], seed=plain["seed"], config=plain, **parts)
    validate(cell)
    return cell


_ANNOTATIONS = {"conditions": Conditions, "runtime": Runtime}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
