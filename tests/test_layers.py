"""The architecture, enforced: who may import whom, names that say something, files that fit on a few screens."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "immunize"
LAYERS = {
    "cli": 5,
    "config": 4,
    "curve_rows": 4,
    "instantiate": 4,
    "pipeline": 4,
    "before": 4,
    "release": 4,
    "validation": 4,
    "plan": 4,
    "progress": 4,
    "rejudge": 4,
    "runner": 4,
    "scoring": 4,
    "sharing": 4,
    "worker": 4,
    "defenses": 3,
    "attacks": 3,
    "judges": 3,
    "benchmarks": 3,
    "training": 2,
    "models": 2,
    "data": 2,
    "conditions": 2,
    "report": 2,
    "stages": 1,
    "records": 1,
    "judgement": 1,
    "manifest": 1,
    "prune": 1,
    "selection": 1,
    "frames": 1,
    "tracking": 1,
    "seeding": 1,
    "stats": 1,
    "study": 1,
    "types": 0,
}
WITHOUT_TORCH = ("conditions", "report")
BANNED = {"utils", "util", "common", "helpers", "helper", "misc"}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The layer entry of a file: its top-level package or module."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> Iterator[str]:
    """Every imported module, lazily imported ones included; those for type checkers alone left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_layer_imports_only_what_lies_below_or_beside_it(path: Path) -> None:
    here = part_of(path)
    if here == "__init__":
        return
    for module in imported(path):
        if module.startswith("immunize."):
            there = module.split(".")[1]
            assert there in LAYERS, f"{module} has no layer"
            assert LAYERS[there] <= LAYERS[here], f"{here} (layer {LAYERS[here]}) imports {module}"
            assert not (LAYERS[there] == LAYERS[here] == 3 and there != here), f"siblings: {here} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_and_special_packages_stay_where_they_belong(path: Path) -> None:
    roots = {module.split(".")[0] for module in imported(path)}
    here = part_of(path)
    if here in WITHOUT_TORCH:
        assert "torch" not in roots
        assert not any(module.startswith(("immunize.training", "immunize.models")) for module in imported(path))
    if here not in ("config", "cli"):
        assert "hydra" not in roots
    if here != "tracking":
        assert "wandb" not in roots
    if here == "types":
        assert roots <= {"dataclasses", "enum"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_small_and_named_for_their_job(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert not BANNED & {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} == set(LAYERS)
