"""The wheel works in an empty folder, and a user's own defense needs no edit of this project."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

OWN_CLASS = '''
from dataclasses import dataclass
from immunize.training.defense import AlignmentDefense
from immunize.training.method import StepOut

@dataclass(frozen=True, kw_only=True)
class Shrink(AlignmentDefense):
    """Learn refusals while pulling the weights towards zero."""
    needs = ("refusals",)
    strength: float = 0.01

    def step(self, context, batch):
        decay = sum((weight * weight).sum() for weight in context.params().values())
        return StepOut(loss=context.ce(batch) + self.strength * decay)
'''

OWN_YAML = """# @package defense.shrink
_target_: own.Shrink
strength: 0.1
tuning: {learning_rate: 3e-4, steps: 10, batch_size: 8}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", folder, PROJECT], check=True, capture_output=True, cwd=folder
    )
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def run(code: str, *, site: Path, folder: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in `folder` with only `site` added to the path, so that this checkout is not what is imported."""
    place = repr(str(site))
    check = f"import sys; sys.path.insert(0, {place}); import immunize; assert {place} in immunize.__file__; "
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", check + code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_composes_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "from immunize.cli.run import main; main()"
    done = run(code, site=installed, folder=tmp_path, arguments=("--cfg", "job"))
    assert done.returncode == 0, done.stderr
    assert "immunize.defenses.repnoise.RepNoise" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_the_models_and_the_papers_values(installed: Path) -> None:
    for checkpoint in ("aligned", "base"):
        assert (installed / "immunize" / "models" / "miniature" / checkpoint / "model.safetensors").is_file()
    assert (installed / "immunize" / "report" / "paper_figure_2.json").is_file()


def test_a_users_own_defense_needs_a_class_and_a_yaml(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_CLASS)
    (tmp_path / "conf" / "defense").mkdir(parents=True)
    (tmp_path / "conf" / "defense" / "shrink.yaml").write_text(OWN_YAML)
    code = (
        "from immunize.config import build, load; cell = build(load(['defense=[shrink,repnoise]'])); "
        "print(cell.defense['shrink'].strength, list(cell.defense))"
    )
    done = run(f"sys.path.insert(0, {str(tmp_path)!r}); {code}", site=installed, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1 ['shrink', 'repnoise']"


def test_the_list_of_packages_is_complete() -> None:
    source = PROJECT / "src"
    found = {".".join(path.parent.relative_to(source).parts) for path in source.rglob("__init__.py")}
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == found | {"immunize.conf"}
