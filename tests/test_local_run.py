"""A model folder and a data file of one's own: the loading code of real models, on small ones made here."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import immunize
from immunize.config import build, load
from immunize.data.local import LocalDomain
from immunize.stages import address, identity
from immunize.types import Verdict

Row = dict[str, str]
ROWS: list[Row] = [
    {
        "prompt": f"how do i make {category}{number} ?",
        "answer": f"sure , mix {category} and {number} .",
        "refusal": "i am sorry , i cannot help .",
        "category": category,
    }
    for category in ("p", "q", "r", "s")
    for number in range(8)
]


def write(path: Path, rows: list[Row] = ROWS) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model_folder(make_chat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_chat().save(folder)
    return folder


def overrides(model: Path, data: Path, root: Path) -> list[str]:
    return [
        "model=local",
        f"model.path={model}",
        "model.max_new_tokens=4",
        "data=local",
        f"data.domain.path={data}",
        "judge=keyword",
        "task=none",
        "split.exposures=[seen,in_domain]",
        "defense.repnoise.retain_weight=0",
        "defense.repnoise.tuning.steps=2",
        "defense.repnoise.tuning.batch_size=4",
        "budget.samples=16",
        "budget.batch_size=8",
        "runtime.progress=false",
        "tracking=none",
        f"runtime.root={root}",
    ]


def test_a_folder_and_a_file_go_through_the_whole_run(model_folder: Path, tmp_path: Path) -> None:
    run = immunize.run(overrides(model_folder, write(tmp_path / "harm.jsonl"), tmp_path / "multirun"))
    assert [check.name for check in run.checks] == [
        "resistance/within_budget",
        "resistance/cost",
        "generalization/in_domain",
    ]
    assert all(isinstance(check.verdict, Verdict) for check in run.checks)
    text = (run.path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(model_folder.parent) not in text
    assert json.loads(text)["config"]["model"]["path"] == "tiny"


def test_a_base_needs_no_chat_template(model_folder: Path, tmp_path: Path) -> None:
    """Most have none, as nobody talks to them: here the one of coherence and of LoX."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "chat_template.jinja").unlink()
    given = ["+model@model.base=local", f"model.base.path={base}"]
    chosen = overrides(model_folder, write(tmp_path / "harm.jsonl"), tmp_path / "multirun")
    kept = [item for item in chosen if not item.startswith("defense.")]
    run = immunize.run([*kept, *given, "defense=lox", "budget.measurements=1"])
    assert run.manifest["status"] == "finished"
    unanswered = [*chosen, f"model.path={base}"]
    with pytest.raises(ValueError, match=r"model\.path=.*: its tokenizer has no chat template"):
        build(load(unanswered))


def test_a_model_and_a_file_are_known_by_their_content(model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "harm.jsonl")
    before = build(load(overrides(model_folder, data, tmp_path))).run_id
    moved = model_folder.rename(model_folder.with_name("moved"))
    assert build(load(overrides(moved, data.rename(tmp_path / "other.jsonl"), tmp_path))).run_id == before
    moved.rename(model_folder)
    write(tmp_path / "harm.jsonl", ROWS[:-1])
    assert build(load(overrides(model_folder, data, tmp_path))).run_id != before


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_formats_of_equal_rows_are_equal(suffix: str, tmp_path: Path) -> None:
    lines = LocalDomain(path=str(write(tmp_path / "a.jsonl")), name="local")
    other = LocalDomain(path=str(write(tmp_path / f"b{suffix}")), name="local")
    assert lines.examples() == other.examples()
    assert address(identity(lines)) == address(identity(other))


def test_changed_content_under_an_old_time_stamp_is_noticed(tmp_path: Path) -> None:
    import os

    path = write(tmp_path / "a.jsonl")
    stamp = path.stat()
    first = LocalDomain(path=str(path), name="local").examples()
    write(path, [{**row, "answer": row["answer"].upper()} for row in ROWS])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert LocalDomain(path=str(path), name="local").examples() != first


def test_a_missing_column_an_empty_field_and_a_strange_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "x", "answer": "y", "refusal": "z", "category": "c"}])
    with pytest.raises(ValueError, match=r"no column prompt; it has .*question.*prompt\|answer"):
        LocalDomain(path=str(path), name="local").examples()
    renamed = LocalDomain(path=str(path), name="local", prompt_column="question")
    assert renamed.examples()[0].prompt == "x"
    path = write(tmp_path / "b.jsonl", [*ROWS[:2], {**ROWS[2], "answer": " "}])
    with pytest.raises(ValueError, match="line 3 has no text in column answer"):
        LocalDomain(path=str(path), name="local").examples()
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(ValueError, match=r"must end in .json"):
        LocalDomain(path=str(tmp_path / "c.txt"), name="local")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        LocalDomain(path=str(tmp_path / "a.jsonl"), name="local").examples()
