"""Whether somebody else's configuration may be built here. `_target_` runs code, so everything is refused by default.

Allowed are the classes that a shipped choice names; a key that builds or resolves anything is looked for everywhere
in the configuration, also where nothing of ours would look at it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from immunize.manifest import PLACES
from immunize.sharing.inert import plain
from immunize.types import TARGET

# In `runtime` and `tracking` only, which `replay` writes anew: where records land and who is told is the user's affair.
OWN = ("immunize.config.", "immunize.tracking.")
PACKAGES = (
    "immunize.attacks.",
    "immunize.benchmarks.",
    "immunize.conditions.settings.",
    "immunize.data.",
    "immunize.defenses.",
    "immunize.judges.",
    "immunize.models.",
    "immunize.training.",
)
# They send what is judged to an address of the configuration, with a key of the machine that they run on.
SENDING = ("immunize.judges.endpoint.", "immunize.judges.strong_reject.Rubric", "immunize.judges.zoo.")
TASKS, LIBRARY = "immunize.benchmarks.harness.Harness", "lm_eval"
MOST_THREADS = 256
MOST_RESAMPLES = 100_000
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_PATH = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:|(?:.*[/\\])?\.\.(?:[/\\]|$)")


@cache
def allowed_targets() -> frozenset[str]:
    """The classes that the shipped choices name; nothing else of this package is meant as configuration."""
    texts = (item.read_text(encoding="utf-8") for item in _files(resources.files("immunize.conf")))
    found = {target for text in texts for target in re.findall(r"_target_:\s*([\w.]+)", text)}
    return frozenset(target for target in found if target.startswith((*PACKAGES, *OWN)))


def refuse_unsafe(config: Mapping[str, Any], *, trusted: Sequence[str] = ()) -> None:
    """Raise ValueError at the first thing that could run code, read a file or resolve a value of this machine.

    `trusted` lists packages (or modules, or classes) of the user's own choice.
    """
    if any(package.partition(".")[0] == "immunize" for package in trusted):
        raise ValueError(
            "--trust immunize: refused: what of immunize is configuration needs no trust, the rest gets none"
        )
    for key, node in _walk(config, ""):
        if isinstance(node, str):
            _refuse_text(key, node)
        elif isinstance(node, Mapping):
            _refuse_keys(key, node, trusted=trusted)
    threads = config["runtime"]["threads"]
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"runtime.threads={threads}: refused: must lie between 1 and {MOST_THREADS}")
    if not isinstance(resamples := config["conditions"].get("resamples", 0), int) or resamples > MOST_RESAMPLES:
        raise ValueError(f"conditions.resamples={plain(resamples)}: refused: at most {MOST_RESAMPLES}")


def _refuse_keys(key: str, node: Mapping[str, Any], *, trusted: Sequence[str]) -> None:
    for name in node:
        here = f"{key}.{plain(name)}" if key else plain(name)
        if not isinstance(name, str) or not _KEY.fullmatch(name):
            raise ValueError(f"{here}: refused: a key holds letters, digits and _ . @ + - only")
        if name.startswith("_") and name.endswith("_") and name != TARGET:
            raise ValueError(f"{here}: refused: the only key of this kind is {TARGET}")
    if TARGET not in node:
        return
    target = node[TARGET]
    chosen = isinstance(target, str) and any(f"{target}.".startswith(f"{package}.") for package in trusted)
    if isinstance(target, str) and target.startswith(SENDING):
        raise ValueError(
            f"{key}.{TARGET}={plain(target, longest=80)}: refused: such a judge sends answers, with a key of yours, to "
            "where somebody else's configuration says; immunize-judge asks one of your own choice"
        )
    if target == TASKS and node.get("path") is not None and LIBRARY not in trusted:
        raise ValueError(
            f"{key}.path={plain(node['path'], longest=80)}: refused: task files of lm-eval are code, their templates "
            f"too; if you have read those of the folder that you name, --trust {LIBRARY} allows them"
        )
    known = isinstance(target, str) and target in allowed_targets()
    if known and str(target).startswith(OWN):
        known = key in ("runtime", "tracking")
    if not (known or chosen):
        where = f"{key}.{TARGET}" if key else TARGET
        raise ValueError(
            f"{where}={plain(target, longest=80)}: refused: not a class that a shipped configuration names; "
            "if you have read its code, --trust PACKAGE allows it"
        )


def _refuse_text(key: str, text: str) -> None:
    shown = plain(text, longest=80)
    if "${" in text:
        raise ValueError(f"{key}={shown}: refused: a manifest holds values, and this would be resolved here")
    if not text.replace("\n", "").replace("\t", "").isprintable():
        raise ValueError(f"{key}={shown}: refused: holds control characters")
    if key.rpartition(".")[2] in PLACES and ("/" in text or "\\" in text):
        raise ValueError(f"{key}={shown}: refused: a manifest holds names only; give the place with --source")
    if _PATH.match(text):
        raise ValueError(f"{key}={shown}: refused: looks like a path, and a manifest holds none")


def _walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every node with its dotted key, from the root down."""
    yield key, node
    if isinstance(node, Mapping):
        for name, item in node.items():
            yield from _walk(item, f"{key}.{plain(name)}" if key else plain(name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _walk(item, f"{key}[{index}]")


def _files(folder: Traversable) -> Iterator[Traversable]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _files(item)
        elif item.name.endswith(".yaml"):
            yield item
