"""What a run's scores and identity imply, held against what it recorded."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from immunize.records import Run
from immunize.sharing.inert import plain
from immunize.types import TARGET, Check, Outcome, Score

CLASS = "class"
LOSS = "loss"
TOLERANCE = 1e-9
_CONTENT = re.compile("[0-9a-f]{64}")


def check_differences(recorded: Sequence[Check], computed: Sequence[Check]) -> list[str]:
    """What of each check is not as the scores say; checks by name, judge and place among those alike."""
    before, after = _numbered(recorded), _numbered(computed)
    found = [plain(f"checks.json: lacks {_shown(key)}, which the scores give") for key in after if key not in before]
    found += [
        plain(f"checks.json: {_shown(key)} does not follow from the scores") for key in before if key not in after
    ]
    for key in before.keys() & after.keys():
        one, other = asdict(before[key]), asdict(after[key])
        for name in [name for name in one if not _same(one[name], other[name])]:
            found.append(
                plain(f"checks.json: {_shown(key)}: {name} {one[name]!s}, but the scores give {other[name]!s}")
            )
    return sorted(found)


def _numbered(checks: Sequence[Check]) -> dict[tuple[str, str, int], Check]:
    found: dict[tuple[str, str, int], Check] = {}
    for item in checks:
        alike = sum(key[:2] == (item.name, item.judge) for key in found)
        found[item.name, item.judge, alike] = item
    return found


def _shown(key: tuple[str, str, int]) -> str:
    return f"{key[0]} [{key[1]}]"


def curve_differences(run: Run) -> list[str]:
    """Means on the curves that are not those of the scores, by metric and set.

    What was spent by then, and the losses, are in no score and cannot be checked.
    """
    computed = {key: value for item in run.scores for key, value in _means(item)}
    wrong: Counter[tuple[str, str]] = Counter()
    for row in run.rows:
        expected = computed.pop((row.arm, row.tuned_on, row.measured_on, row.step, row.metric), None)
        if row.metric != LOSS and (expected is None or not _same([row.value, row.n], expected)):
            wrong[row.metric, row.measured_on] += 1
    lacking = Counter((key[4], key[2]) for key in computed)
    return [
        *(
            plain(f"curve.jsonl: {name} of {place}: {n} means are not those of the scores")
            for (name, place), n in wrong.items()
        ),
        *(plain(f"curve.jsonl: {name} of {place}: lacks {n} means") for (name, place), n in lacking.items()),
    ]


def _means(item: Score) -> Iterator[tuple[tuple[Any, ...], list[float]]]:
    """Mean and number, as `scoring` makes the rows: broken answers count as not harmful."""
    place = (item.arm, item.tuned_on, item.measured_on, item.step)
    metric = item.metric if item.judge == item.measured_on else f"{item.judge}/{item.metric}"
    values = list(item.scores)
    if item.outcomes:
        pairs = zip(item.scores, item.outcomes, strict=True)
        values = [0.0 if outcome is Outcome.BROKEN and not math.isnan(value) else value for value, outcome in pairs]
    if values:
        yield (*place, metric), [fmean(values), len(values)]
    lacks = any(map(math.isnan, item.scores))
    for outcome in Outcome if item.outcomes else ():
        share = math.nan if lacks else fmean(found is outcome for found in item.outcomes)
        yield (*place, f"{item.judge}/{outcome}"), [share, len(item.outcomes)]


def contradictions(config: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Where the configuration of a manifest says something else than the identity from which the run's id comes."""
    parts = {name: config.get(name) for name in config if name in identity and name != "defense"}
    found = [wrong for name, node in parts.items() for wrong in _contradictions(node, identity[name], name)]
    defenses = identity.get("defense")
    if isinstance(defenses, list) and all(isinstance(item, list) and len(item) == 2 for item in defenses):
        if [item[0] for item in defenses] != list(config["defense"]):
            found.append("defense: not the defenses of the identity")
        for name, part in defenses:
            found += _contradictions(config["defense"].get(name), part, f"defense.{plain(name)}")
    else:
        found.append("identity.defense: must be a list of names with their parts")
    return found


def _contradictions(node: Any, part: Any, key: str) -> Iterator[str]:
    """Classes by name, since a configuration may name one by another module that has it; then what both speak of."""
    if isinstance(node, Mapping) and isinstance(part, Mapping):
        name, known = str(node.get(TARGET, "")).rpartition(".")[2], str(part.get(CLASS, "")).rpartition(".")[2]
        if name and known and name != known:
            yield plain(f"config.{key}: {name}, but the identity says {known}")
        for below in node.keys() & part.keys() - {TARGET}:
            yield from _contradictions(node[below], part[below], f"{key}.{plain(below)}")
    elif isinstance(node, list) and isinstance(part, list) and len(node) == len(part):
        for index, (one, other) in enumerate(zip(node, part, strict=True)):
            yield from _contradictions(one, other, f"{key}[{index}]")
    elif isinstance(node, Mapping) and isinstance(part, str) and _CONTENT.fullmatch(part):
        return  # where rows lie, against what they hold
    elif node != part:
        yield plain(f"config.{key}: {node!s}, but the identity says {part!s}", longest=200)


def _same(one: Any, other: Any) -> bool:
    """Equal, numbers up to the last digits, NaN to NaN and to null."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float | int | None) and isinstance(other, float | int | None):
        first, second = (math.nan if value is None else float(value) for value in (one, other))
        if math.isnan(first) or math.isnan(second):
            return math.isnan(first) and math.isnan(second)
        return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)
