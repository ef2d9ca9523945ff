"""What came from somebody else, made harmless: text that only prints, JSON that only is data."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

DEEPEST = 40


def plain(text: object, *, longest: int = 600) -> str:
    """Text without control characters, so that nothing printed can move the cursor, color, hide or reorder."""
    kept = "".join(character for character in str(text) if character.isprintable())
    return kept if len(kept) <= longest else f"{kept[:longest]}..."


def parse(text: str | bytes) -> Any:
    """Strict JSON: refuses a key given twice, NaN, infinities, and nesting that would exhaust the stack."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _refuse_depth(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it gives a key twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for node in level for item in _below(node)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _below(node: Any) -> Sequence[Any]:
    """The containers inside of a container."""
    items = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [item for item in items if isinstance(item, Mapping | list)]
