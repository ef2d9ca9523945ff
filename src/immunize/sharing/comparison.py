"""A run there and here: equal bytes where everything that changes bits is equal, else the intervals of each check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from immunize.records import Run
from immunize.sharing.inert import plain
from immunize.types import Check

COMPARED = ("curve.jsonl", "scores.jsonl", "checks.json")
# Of the hardware, what changes the bits on a CPU; a GPU gives no such promise at all.
HARDWARE = ("device", "cpu_capability", "machine", "system")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run's outcome. `asked` is what was held against the archive, `passed` None where nothing could be."""

    run_id: str
    asked: Literal["bytes", "intervals"]
    passed: bool | None
    environment: Sequence[str]
    lines: Sequence[str]


def compare(there: Run, here: Run) -> Compared:
    """Hold the replayed run against the recorded one."""
    differing = environment(there.manifest, here.manifest)
    if differing or there.manifest["hardware"]["device"] != "cpu":
        passed, lines = intervals(there.checks, here.checks)
        return Compared(run_id=there.id, asked="intervals", passed=passed, environment=differing, lines=lines)
    wrong = [name for name in COMPARED if (there.path / name).read_bytes() != (here.path / name).read_bytes()]
    lines = [f"{name}: {'differs' if name in wrong else 'equal'}" for name in COMPARED]
    if wrong:  # says how much it matters, and excuses nothing
        lines += [*_asides(there.manifest, here.manifest), *intervals(there.checks, here.checks)[1]]
    return Compared(run_id=there.id, asked="bytes", passed=not wrong, environment=[], lines=lines)


def environment(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What can change the bits and is not the same, in words; the commit is none of it, since versions speak for it."""
    pairs = {"lock": (there["code"]["lock"], here["code"]["lock"])}
    packages = dict.fromkeys([*there["packages"], *here["packages"]])
    pairs |= {f"package {name}": (there["packages"].get(name), here["packages"].get(name)) for name in packages}
    pairs["threads"] = (there["config"]["runtime"]["threads"], here["config"]["runtime"]["threads"])
    pairs["devices"] = (there["config"]["runtime"].get("devices", 1), here["config"]["runtime"].get("devices", 1))
    pairs |= {name: (there["hardware"][name], here["hardware"][name]) for name in HARDWARE}
    return [
        plain(f"{name}: {_short(one)} there, {_short(other)} here")
        for name, (one, other) in pairs.items()
        if one != other
    ]


def _asides(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What should change nothing and may explain a difference all the same."""
    pairs = {"commit": (there["code"]["commit"], here["code"]["commit"])}
    pairs["python"] = (there["hardware"]["python"], here["hardware"]["python"])
    return [plain(f"{name}: {one} there, {other} here") for name, (one, other) in pairs.items() if one != other]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 32 else f"{text[:10]}..."


def intervals(there: Sequence[Check], here: Sequence[Check]) -> tuple[bool | None, list[str]]:
    """Whether the intervals of each check overlap; a check without interval is the same when its verdict is.

    Without any check (no defense) there is nothing to hold against each other: None.
    """
    if not there and not here:
        return None, ["no checks (no defense), and so nothing to compare but bytes, which are not asked for here"]
    before, after = ({(item.name, item.judge): item for item in checks} for checks in (there, here))
    lines: list[str] = []
    passed = True
    for key in dict.fromkeys([*before, *after]):
        name = f"{key[0]} [{key[1]}]" if key[1] else key[0]
        if key not in before or key not in after:
            passed = False
            lines.append(plain(f"{name}: answered {'here' if key in after else 'there'} only"))
            continue
        agrees, said = _overlap(before[key], after[key])
        passed = passed and agrees
        lines.append(plain(f"{name}: {said} ({before[key].verdict} there, {after[key].verdict} here)"))
    return passed, lines


def _overlap(there: Check, here: Check) -> tuple[bool, str]:
    if None in (there.low, there.high, here.low, here.high):
        same = there.verdict is here.verdict
        return same, "no interval on one side or both; the verdict is " + ("the same" if same else "another")
    low, high = (there.low or 0.0, here.low or 0.0), (there.high or 0.0, here.high or 0.0)
    agrees = max(low) <= min(high)
    shown = f"{low[0]:.3g} to {high[0]:.3g} there, {low[1]:.3g} to {high[1]:.3g} here"
    return agrees, f"the intervals {'overlap' if agrees else 'do not overlap'}, {shown}"
