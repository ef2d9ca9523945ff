"""Packing a study and verifying what was packed: contents, privacy, equal bytes, and each kind of tampering."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from immunize import records
from immunize.sharing.members import INDEX
from immunize.sharing.pack import pack
from immunize.stages import address, hash_file, seal, write_durably
from tests.shared import change_lines, change_manifest, members, rewritten, share
from tests.synthetic import write_study

RECORDS = {"DONE", "manifest.json", "items.jsonl", "curve.jsonl", "scores.jsonl", "checks.json"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("share") / "multirun"
    return write_study(
        root, "grid", defenses=("none", "repnoise"), rates=(1e-3,), seeds=(0,), more=("conditions.resamples=200",)
    )


@pytest.fixture
def study(original: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(original, tmp_path / "multirun" / "grid"))


@pytest.fixture(scope="module")
def archive(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(original, output=tmp_path_factory.mktemp("archive") / "grid.tar.gz").path


def runs(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("*/DONE"))


def defended(study: Path) -> Path:
    return next(run for run in runs(study) if json.loads((run / "checks.json").read_text()))


def fail(run: Path, error: BaseException) -> Path:
    manifest = json.loads((run / "manifest.json").read_text())
    records.start(run, manifest)
    records.fail(run, error, manifest=manifest)
    return run


def test_an_archive_holds_every_runs_records_and_an_index_of_their_hashes(archive: Path, original: Path) -> None:
    found = members(archive)
    for run in runs(original):
        assert {name.rpartition("/")[2] for name in found if f"/{run.name}/" in name} == RECORDS
        assert found[f"grid/{run.name}/scores.jsonl"] == (run / "scores.jsonl").read_bytes()
    index = json.loads(found[f"grid/{INDEX}"])
    assert (index["format"], index["study"]) == (1, "grid")
    assert {f"grid/{name}" for name in index["members"]} == set(found) - {f"grid/{INDEX}"}
    assert index["members"]["requirements.lock"] == hash_file(Path(__file__).parents[1] / "requirements.lock")


def test_nothing_else_that_lies_in_the_folder_is_packed(study: Path, tmp_path: Path) -> None:
    run = runs(study)[0]
    assert (run / "samples.jsonl.gz").exists()
    for name in ("wandb/run.json", ".hidden", "notes.txt", "model.safetensors"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (study / "notes.txt").write_text("x")
    (study / "report").mkdir()
    for name in ("index.html", "verdicts.csv", ".cache", "script.py"):
        (study / "report" / name).write_text("claim,check,verdict\n")
    (study / "judgements").mkdir()
    (study / "judgements" / "guard-0123456789.jsonl").write_text("{}")
    (study / "0123456789").mkdir()  # claimed, and not finished
    packed = pack(study, output=tmp_path / "a.tar.gz")
    names = {name.partition("/")[2] for name in members(packed.path)}
    assert {name for name in names if "/" not in name} == {INDEX, "requirements.lock"}
    assert {name for name in names if name.startswith("report/")} == {"report/index.html", "report/verdicts.csv"}
    assert {name.rpartition("/")[2] for name in names if name[:10] == run.name} == RECORDS
    assert [line.partition(":")[0] for line in packed.left_out] == [
        "run 0123456789",
        "report/.cache",
        "report/script.py",
        "judgements/guard-0123456789.jsonl",
    ]


def test_samples_and_weights_only_on_request(study: Path, tmp_path: Path) -> None:
    stage = study.parent / ".stages" / "prepare" / address({"weights": "x"})
    (stage / "weights").mkdir(parents=True)
    (stage / "inputs.json").write_text(json.dumps({"weights": "x"}))
    (stage / "weights" / "model.safetensors").write_bytes(b"\0" * 100)
    seal(stage)
    run = defended(study)
    change_manifest(run, lambda manifest: manifest.update(stages=[{"kind": "prepare", "id": stage.name}]))
    packed = pack(study, output=tmp_path / "a.tar.gz", weights=True, samples=True)
    names = {name.partition("/")[2] for name in members(packed.path)}
    assert f"{run.name}/samples.jsonl.gz" in names
    assert f"stages/prepare/{stage.name}/weights/model.safetensors" in names
    assert share("verify", packed.path) == 0
    bad = rewritten(
        packed.path,
        tmp_path / "b.tar.gz",
        lambda found: found.update({f"grid/stages/prepare/{stage.name}/weights/model.safetensors": b"other"}),
    )
    assert share("verify", bad) == 1
    shutil.rmtree(stage)
    with pytest.raises(ValueError, match=r"prepare/\w+: DONE is missing"):
        pack(study, output=tmp_path / "c.tar.gz", weights=True)


def test_equal_content_gives_equal_bytes_wherever_and_whenever(archive: Path, study: Path, tmp_path: Path) -> None:
    for path in study.rglob("*"):
        path.touch()
    assert pack(study, output=tmp_path / "again.tar.gz").path.read_bytes() == archive.read_bytes()
    assert b"root" not in archive.read_bytes()[:40]


def test_a_failed_run_is_packed_with_its_traceback(study: Path, tmp_path: Path) -> None:
    run = fail(runs(study)[0], RuntimeError(f"in {Path.home()}/secret"))
    packed = pack(study, output=tmp_path / "a.tar.gz")
    names = {name.rpartition("/")[2] for name in members(packed.path) if f"/{run.name}/" in name}
    assert names == {"manifest.json", "ERROR.txt"}
    assert share("verify", packed.path) == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see {home}/data.csv", "home directory"),
        ("at /data/alice/x.py line 3", "the user name alice"),
        ("at /home/bob/x.py", "a home directory"),
        (r"at C:\Users\bob\x.py", "a home directory"),
        ("token hf_" + "aB3" * 11, "a Hugging Face token"),
        ("WANDB_API_KEY=" + "0a" * 20, "a W&B key"),
        ("key sk-" + "abcDEF123" * 4, "a secret key"),
        ("-----BEGIN RSA PRIVATE " + "KEY-----", "a private key"),
    ],
)
def test_what_is_private_is_refused_by_file_and_kind(
    text: str, found: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "house"))
    monkeypatch.setenv("LOGNAME", "alice")
    run = fail(runs(study)[0], RuntimeError())
    write_durably(run / "ERROR.txt", text.format(home=tmp_path / "house").encode())
    with pytest.raises(ValueError, match=rf"{run.name}/ERROR\.txt: holds .*{found}") as error:
        pack(study, output=tmp_path / "a.tar.gz")
    assert "aB3aB3" not in str(error.value)
    assert not (tmp_path / "a.tar.gz").exists()


def test_words_and_hashes_are_not_taken_for_secrets(study: Path, tmp_path: Path) -> None:
    run = fail(runs(study)[0], RuntimeError())
    write_durably(run / "ERROR.txt", f"task-specific-and-quite-long-words hf_hub {'0a' * 20} /homely/x".encode())
    assert pack(study, output=tmp_path / "a.tar.gz").runs == 2


def test_damage_links_and_an_existing_output_are_refused(study: Path, tmp_path: Path) -> None:
    run = runs(study)[0]
    (tmp_path / "there").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        pack(study, output=tmp_path / "there")
    (run / "items.jsonl").rename(tmp_path / "items.jsonl")
    (run / "items.jsonl").symlink_to(tmp_path / "items.jsonl")
    with pytest.raises(ValueError, match=r"items\.jsonl: a symbolic link"):
        pack(study, output=tmp_path / "a.tar.gz")
    (run / "items.jsonl").unlink()
    assert share("pack", study, "--output", tmp_path / "a.tar.gz") == 2
    with pytest.raises(ValueError, match="holds no finished and no failed run"):
        pack(tmp_path / "multirun", output=tmp_path / "a.tar.gz")
    assert (tmp_path / "there").read_text() == "kept"


def test_verify_finds_an_archive_and_a_folder_well(
    archive: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert share("verify", archive) == 0
    assert "2 runs, 2 computed anew, 0 with differences" in capsys.readouterr().out
    assert share("verify", original) == 0


def test_verify_imports_no_torch(archive: Path) -> None:
    code = (
        f"import sys; sys.argv = ['immunize-share', 'verify', {str(archive)!r}]\n"
        "from immunize.cli.share import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'lightning', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def raised(line: dict[str, Any]) -> dict[str, Any]:
    harmless = line["metric"] == "harmfulness" and line["arm"] == "defended"
    return line | ({"scores": [0.0] * len(line["scores"])} if harmless else {})


def change_check(run: Path, **changes: Any) -> None:
    checks = json.loads((run / "checks.json").read_text())
    checks[0] |= changes
    (run / "checks.json").write_text(json.dumps(checks))
    seal(run)


def break_file(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)
    seal(run)


def change_identity(manifest: dict[str, Any]) -> None:
    manifest["identity"]["budget"]["learning_rate"] = 0.5


def change_config(manifest: dict[str, Any]) -> None:
    manifest["config"]["conditions"]["margin"] = 0.4


def make_slow(manifest: dict[str, Any]) -> None:
    manifest["config"]["conditions"]["resamples"] = 10**9


def leave_margin_out(manifest: dict[str, Any]) -> None:
    manifest["identity"]["conditions"]["margin"] = 0.4
    manifest["config"]["conditions"].pop("margin")


def unseal(run: Path) -> None:
    done = json.loads((run / "DONE").read_text())
    (run / "DONE").write_text(json.dumps({name: digest for name, digest in done.items() if name != "scores.jsonl"}))


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda run: (run / "scores.jsonl").write_text("{}"), "scores.jsonl changed or missing"),
    "scores": (lambda run: change_lines(run, "scores.jsonl", raised), r"but the scores give"),
    "a verdict": (lambda run: change_check(run, verdict="holds", estimate=-0.9), "estimate -0.9, but the scores give"),
    "a reason": (lambda run: change_check(run, reason="<script>"), "reason <script>, but"),
    "a check's name": (lambda run: change_check(run, name="x"), "x .* does not follow from the scores"),
    "a curve": (
        lambda run: change_lines(run, "curve.jsonl", lambda row: row | {"value": 0.123}),
        "means are not those",
    ),
    "a curve's length": (lambda run: change_lines(run, "curve.jsonl", lambda row: row | {"n": 3}), "are not those"),
    "a curve's name": (lambda run: change_lines(run, "curve.jsonl", lambda row: row | {"metric": "loss"}), "lacks 22"),
    "an unsealed record": (unseal, "DONE: has no hash of scores.jsonl"),
    "a margin left out": (
        lambda run: change_manifest(run, leave_margin_out),
        "conditions of the configuration are not those of the identity",
    ),
    "an impossible score": (
        lambda run: change_lines(run, "scores.jsonl", lambda line: line | {"scores": [1.5 for _ in line["scores"]]}),
        r"scores\.jsonl\[0\]: a score lies outside",
    ),
    "an id": (lambda run: change_manifest(run, lambda item: item.update(run_id="0" * 10)), "run_id 0000000000"),
    "an identity": (lambda run: change_manifest(run, change_identity), "the identity gives run id"),
    "a margin": (lambda run: change_manifest(run, change_config), r"conditions\.margin: 0\.4, but the identity says"),
    "endless work": (lambda run: change_manifest(run, make_slow), "more than is computed here"),
    "a missing key": (lambda run: change_manifest(run, lambda item: item.pop("code")), "manifest.json: lacks code"),
    "a wrong type": (
        lambda run: change_manifest(run, lambda item: item["config"].update(seed="0")),
        r"config\.seed: must be a whole number",
    ),
    "no JSON": (lambda run: break_file(run, "checks.json", "[{]"), "checks.json: cannot be read"),
    "a key twice": (lambda run: break_file(run, "manifest.json", '{"a": 1, "a": 2}'), "gives a key twice"),
    "deep nesting": (lambda run: break_file(run, "manifest.json", "[" * 10**5), "nested too deeply"),
    "nested mappings": (
        lambda run: break_file(run, "manifest.json", '{"a":' * 99 + "1" + "}" * 99),
        "nested too deeply",
    ),
    "NaN": (lambda run: break_file(run, "scores.jsonl", '{"a": NaN}\n'), "NaN is not JSON"),
    "an unknown arm": (
        lambda run: change_lines(run, "scores.jsonl", lambda line: line | {"arm": "third"}),
        r"scores\.jsonl\[0\]\.arm: must be one of control, defended",
    ),
    "a foreign field": (lambda run: change_lines(run, "items.jsonl", lambda line: line | {"x": 1}), "has no key x"),
    "short arrays": (
        lambda run: change_lines(run, "scores.jsonl", lambda line: line | {"scores": [0.5]}),
        "checks cannot be computed",
    ),
    "no DONE": (
        lambda run: (run / "DONE").unlink(),
        "its files are those of a running run, its manifest says finished",
    ),
    "a hidden failure": (lambda run: (run / "ERROR.txt").write_text("x"), "its files are those of a failed run"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_verify_finds_tampering(kind: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    change, expected = TAMPERINGS[kind]
    run = defended(study)
    change(run)
    assert share("verify", study) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"run {run.name}: ")]
    assert any(re.search(expected, line) for line in lines), lines


def test_changed_scores_are_found_in_an_archive_whose_hashes_all_fit(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_lines(defended(study), "scores.jsonl", raised)
    assert share("verify", pack(study, output=tmp_path / "a.tar.gz").path) == 1
    assert "but the scores give" in capsys.readouterr().out


def test_a_hash_that_is_not_the_indexs_and_a_missing_member_are_differences(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(found: dict[str, bytes]) -> None:
        found["grid/requirements.lock"] = b"other"
        found.pop(next(name for name in found if name.endswith("items.jsonl")))

    assert share("verify", rewritten(archive, tmp_path / "a.tar.gz", change, index=False)) == 1
    output = capsys.readouterr().out
    assert "requirements.lock: its SHA-256 is not the one in the index" in output
    assert "items.jsonl: in the index, but missing" in output


def test_verdicts_of_the_report_are_held_against_the_scores(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from immunize.report.study import assemble
    from immunize.report.tables import verdicts_csv
    from immunize.study import read_study

    table = study / "report" / "verdicts.csv"
    table.parent.mkdir()
    table.write_text(verdicts_csv(assemble(read_study(study))))
    assert share("verify", pack(study, output=tmp_path / "a.tar.gz").path) == 0
    head, first, *rest = table.read_text().splitlines()
    cells = first.split(",")
    cells[4] = "splendid"
    table.write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
    assert share("verify", study) == 1
    output = capsys.readouterr().out
    assert "report/verdicts.csv: the table says repnoise resistance/within_budget splendid exact" in output
    assert "report/verdicts.csv: the scores say repnoise resistance/within_budget" in output
    table.write_text("\n".join([head, *rest]) + "\n")
    assert share("verify", study) == 1
    table.write_text("claim,verdict\n")
    assert share("verify", study) == 1
    assert "verdicts.csv: cannot be read (has no column check)" in capsys.readouterr().out


def test_what_is_printed_cannot_steer_the_terminal(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "\x1b[31mred\x1b[0m \x07 \u202egnp.exe \x9b2J \x00 <script>alert(1)</script>\r\nrun x: well"
    change_check(defended(study), reason=reason, flags=["\x1b]0;title\x07", "\ud800"])
    change_manifest(runs(study)[-1], lambda manifest: manifest.update(run_id="\x1b[2J"))
    assert share("verify", study) == 1
    output = capsys.readouterr()
    assert "<script>alert(1)</script>" in output.out + output.err
    assert all(character.isprintable() for character in (output.out + output.err).replace("\n", ""))
    assert not [line for line in output.out.splitlines() if line.startswith("run x")]


def test_what_is_no_archive_is_refused(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:-500])
    (tmp_path / "empty").mkdir()
    for name in ("text", "cut.tar.gz", "empty", "nowhere"):
        assert share("verify", tmp_path / name) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
