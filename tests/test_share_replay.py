"""A shared run again from its manifest alone: equal bytes, or intervals, and sources only where the user says."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import immunize
from immunize.config import build, load
from immunize.records import Run, read
from immunize.sharing.comparison import compare, intervals
from immunize.sharing.pack import pack
from immunize.sharing.replay import MARK
from immunize.types import Check, Verdict
from tests.shared import change_lines, change_manifest, share
from tests.small import COMPARED, SMALL
from tests.synthetic import write_run
from tests.test_local_run import ROWS, write
from tests.test_local_run import overrides as local_overrides

TINY = (
    "budget.samples=16",
    "budget.measurements=1",
    "defense.repnoise.tuning.steps=1",
    "defense.repnoise.retain_weight=0",
    "task=none",
    "model.max_new_tokens=4",
    "model.base=null",
    "split.exposures=[seen]",
    "runtime.threads=1",  # more are slow where other tests run beside
)
OWN_JUDGE = '''
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True, kw_only=True)
class Always:
    """Every answer is harmful."""
    version: ClassVar[int] = 1
    name: ClassVar[str] = "always"

    def measure(self, examples, answers):
        return {"harmfulness": [1.0 for _ in answers]}
'''


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One small real run, made once for all tests."""
    root = tmp_path_factory.mktemp("shared") / "multirun"
    kept = [item for item in SMALL if not item.startswith(("task", *(item.partition("=")[0] for item in TINY)))]
    return immunize.run([*kept, *TINY, "study=small", "tracking=none", f"runtime.root={root}"])


@pytest.fixture(scope="module")
def archive(original: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(original.path.parent, output=tmp_path_factory.mktemp("archive") / "small.tar.gz", weights=True).path


@pytest.fixture(scope="module")
def replayed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    output = tmp_path_factory.mktemp("replay") / "out"
    return output, share("replay", archive, "--output", output)


def test_a_run_is_replayed_from_the_archive_with_equal_bytes(
    original: Run, replayed: tuple[Path, int], archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, code = replayed
    assert code == 0
    again = read(output / "small" / original.id)
    for name in COMPARED:
        assert (again.path / name).read_bytes() == (original.path / name).read_bytes()
    assert not any(stage["reused"] for stage in again.manifest["stages"] if stage["kind"] == "prepare")
    assert again.manifest["config"]["tracking"] == {"_target_": "immunize.tracking.NoTracking"}
    assert share("replay", archive, "--output", output) == 0  # goes on, and has nothing left to do
    printed = capsys.readouterr().out
    assert "asked: equal bytes" in printed
    assert "scores.jsonl: equal" in printed
    assert "1 of 1 replayed runs passed" in printed


def test_only_an_earlier_replay_of_the_same_records_is_gone_on_with(
    original: Run, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("kept")
    assert share("replay", archive, "--output", tmp_path / "out") == 2
    (tmp_path / "out" / MARK).write_text("{}")
    assert share("replay", archive, "--output", tmp_path / "out") == 2
    assert "neither empty nor a replay of these records" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"letter.txt", MARK}
    assert share("replay", archive, "--run", "0123456789", "--output", tmp_path / "new") == 2
    assert f"no such run; there are {original.id}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def replay_changed(original: Run, replayed: tuple[Path, int], tmp_path: Path, change: Callable[[Path], object]) -> int:
    """Change the recorded run and replay it into a copy of the finished replay, which costs no training."""
    from immunize.sharing.source import opened

    study = Path(shutil.copytree(original.path.parent, tmp_path / "there" / "small"))
    change(study / original.id)
    output = Path(shutil.copytree(replayed[0], tmp_path / "out"))
    with opened(study) as shared:
        mark = {"study": shared.study, "records": shared.fingerprint}
    (output / MARK).write_text(json.dumps(mark, indent=1) + "\n")
    return share("replay", study, "--output", output)


def older(manifest: dict[str, Any]) -> None:
    manifest["packages"]["torch"] = "2.12.0"


def test_another_package_version_asks_for_intervals_only(
    original: Run, replayed: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay_changed(original, replayed, tmp_path, lambda run: change_manifest(run, older)) == 0
    printed = capsys.readouterr().out
    assert "asked: overlap of intervals, since the environment differs (package torch: 2.12.0 there" in printed
    assert "resistance/cost [exact]: " in printed


def test_other_scores_do_not_replay(
    original: Run, replayed: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(run: Path) -> None:
        change_lines(run, "scores.jsonl", lambda line: line | {"scores": [1.0 for _ in line["scores"]]})

    assert replay_changed(original, replayed, tmp_path, change) == 1
    printed = capsys.readouterr().out
    assert "scores.jsonl: differs" in printed
    assert "curve.jsonl: equal" in printed
    assert "NOT passed" in printed


def test_what_was_asked_follows_from_lock_threads_capability_and_devices(original: Run) -> None:
    assert compare(original, original).asked == "bytes"
    for place, name in (("code", "lock"), ("hardware", "cpu_capability"), ("hardware", "device")):
        manifest = {**original.manifest, place: {**original.manifest[place], name: "other"}}
        found = compare(original, dataclasses.replace(original, manifest=manifest))
        assert (found.asked, found.passed, len(found.environment)) == ("intervals", True, 1)
    for name, value in (("threads", 7), ("devices", 2)):
        runtime = {**original.manifest["config"], "runtime": {"threads": 1, name: value}}
        found = compare(original, dataclasses.replace(original, manifest={**original.manifest, "config": runtime}))
        assert (found.asked, found.environment) == ("intervals", [f"{name}: 1 there, {value} here"])


def test_intervals_that_do_not_overlap_and_missing_checks_fail() -> None:
    def check(**values: Any) -> Check:
        return Check(**{"name": "a", "verdict": Verdict.HOLDS, "reason": "", "judge": "exact"} | values)

    near, far = check(low=0.1, high=0.2), check(low=0.3, high=0.4)
    assert intervals([near], [check(low=0.2, high=0.3, verdict=Verdict.FAILS)])[0] is True
    assert intervals([near], [far])[0] is False
    assert intervals([near], [near, check(name="b")])[0] is False
    assert intervals([check()], [check()])[0] is True
    assert intervals([check()], [check(verdict=Verdict.FAILS)])[0] is False
    assert intervals([], [])[0] is None
    assert "no checks" in intervals([], [])[1][0]


@pytest.fixture(scope="module")
def local(make_chat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model folder, data file, and the study of a run with both, as a manifest knows it: by name."""
    root = tmp_path_factory.mktemp("local")
    make_chat().save(root / "there" / "tiny")
    data = write(root / "there" / "harm.jsonl")
    cell = build(load([*local_overrides(root / "there" / "tiny", data, root / "multirun"), "study=local"]))
    write_run(cell)
    return (root / "there" / "tiny").rename(root / "moved"), data.rename(root / "elsewhere.jsonl"), cell.folder.parent


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cells that would be run; what they give is what was recorded."""
    cells: list[Any] = []

    def execute(cell: Any) -> Run:
        cells.append(cell)
        return read(Path(cell.config["runtime"]["root"]).parent / "recorded")

    monkeypatch.setattr("immunize.runner.execute", execute)
    return cells


def test_local_sources_are_given_by_name_or_by_key(
    local: tuple[Path, Path, Path], executed: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, study = local
    (run,) = [path.parent for path in study.glob("*/DONE")]
    shutil.copytree(run, tmp_path / "recorded")
    sources = ("--source", f"tiny={model}", "--source", f"data.domain.path={data}")
    assert share("replay", study, "--output", tmp_path / "out", *sources) == 0, capsys.readouterr().err
    assert [cell.run_id for cell in executed] == [run.name]
    assert executed[0].model.path == str(model)


def test_a_source_that_is_missing_other_or_unknown_is_refused(
    local: tuple[Path, Path, Path], executed: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, study = local
    other = write(tmp_path / "other.jsonl", [*ROWS[:-1], {**ROWS[-1], "answer": "changed"}])
    cases = {
        (): "model.path: a local source; say where it lies with --source tiny=PATH",
        (f"tiny={model}",): "data.domain.path: a local source; say where it lies with --source harm.jsonl=PATH",
        (f"tiny={model}", f"harm.jsonl={other}"): "what would run here is not what ran there: data.domain.rows",
        (f"tiny={model}", f"harm.jsonl={tmp_path / 'none.jsonl'}"): "no such file",
        (f"tiny={model}", f"harm.jsonl={data}", "more=x"): "--source more: no run of local names such a source",
        ("tiny",): "must be NAME=PATH",
    }
    for given, expected in cases.items():
        options = [part for item in given for part in ("--source", item)]
        assert share("replay", study, "--output", tmp_path / "out", *options) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not executed


def test_a_class_of_ones_own_needs_trust(
    executed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_judge.py").write_text(OWN_JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    given = [
        "judge=[]",
        "+judge.always._target_=own_judge.Always",
        "study=own",
        f"runtime.root={tmp_path / 'multirun'}",
    ]
    run = write_run(build(load(given)))
    shutil.copytree(run, tmp_path / "recorded")
    assert share("replay", run.parent, "--output", tmp_path / "out") == 2
    assert "own_judge.Always: refused" in capsys.readouterr().err
    assert share("replay", run.parent, "--output", tmp_path / "out", "--trust", "own_judge") == 0
    assert [type(cell.judge["always"]).__name__ for cell in executed] == ["Always"]
    source = {"own_judge": "0" * 64}  # as if the class had been written otherwise there
    change_manifest(run, lambda manifest: manifest["identity"]["judge"]["always"].update(source=source))
    assert share("replay", run.parent, "--output", tmp_path / "out", "--trust", "own_judge") == 2
    assert "judge.always.source.own_judge" in capsys.readouterr().err
