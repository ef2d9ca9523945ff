"""Rows from files and from the hub: formats agree, what is malformed is named by line, a commit is a commit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from immunize.data.local import LocalDomain
from immunize.data.rows import Rows
from tests.test_local_run import ROWS, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LINES = [json.dumps({**row, "prompt": f"{row['prompt']} {copy}"}) for copy in range(8) for row in ROWS]


def domain(path: Path, **fields: Any) -> LocalDomain:
    return LocalDomain(path=str(path), name="local", **fields)


def lines_to(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[1, 2]",
        "3",
        "[" * 100_000,
        '{"prompt": "x"}',
        LINES[0].replace("sure", "\\ud800"),
        '{"prompt": 3}',
    ],
)
def test_a_malformed_line_is_left_out_named_and_moves_no_other(line: str, tmp_path: Path) -> None:
    whole = domain(lines_to(tmp_path / "a.jsonl", [*LINES[:2], LINES[0].replace("how", "why"), *LINES[2:]]))
    spoilt = domain(lines_to(tmp_path / "b.jsonl", [*LINES[:2], line, *LINES[2:]]))
    expected = whole.examples()
    assert spoilt.examples() == expected[:2] + expected[3:]
    (reading,) = spoilt.readings
    assert (reading.rows, reading.kept, reading.malformed) == (257, 256, ("line 3",))
    assert "1 malformed and left out (line 3)" in str(reading.line())
    assert whole.readings[0].line() is None


def test_too_many_malformed_lines_are_refused_and_the_share_is_a_choice(tmp_path: Path) -> None:
    path = lines_to(tmp_path / "a.jsonl", ["{", *LINES[:98], "{"])
    with pytest.raises(
        ValueError, match=r"2 of 100 rows are malformed.*0\.01 allows: line 1 is no JSON, line 100 is no"
    ):
        domain(path).examples()
    assert len(domain(path, malformed_share=0.02).examples()) == 98
    with pytest.raises(ValueError, match=r"malformed_share=1\.0: must lie in"):
        domain(path, malformed_share=1.0)


def test_many_malformed_lines_are_counted_and_the_first_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"9 of 9 .*line 5 is no JSON and 4 more$"):
        domain(lines_to(tmp_path / "a.jsonl", ["{"] * 9)).examples()


def test_a_csv_row_with_too_few_or_too_many_fields_is_malformed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    before = domain(path).examples()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "just one", *lines[2:], f"{lines[1]},one,more"]) + "\n")
    spoilt = domain(path, malformed_share=0.1)
    assert [item.prompt for item in spoilt.examples()] == [item.prompt for item in before]
    assert spoilt.readings[0].malformed == ("line 3", "line 35")


def test_a_csv_field_may_hold_lines_and_the_line_named_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer,refusal,category\n"one\ntwo",yes,no,c\nthree,,no,c\n')
    with pytest.raises(ValueError, match="line 4 has no text in column answer"):
        domain(path).examples()
    assert domain(path, malformed_share=0.5).examples()[0].prompt == "one\ntwo"


def test_a_quotation_mark_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = ["prompt,answer,refusal,category", *(f"how {n},yes,no,p" for n in range(200))]
    path.write_text("\n".join([*lines[:150], 'how,yes,no,"p', *lines[150:]]) + "\n")
    with pytest.raises(
        ValueError, match=r"a\.csv: a quotation mark of the row that starts after line 150 is never closed"
    ):
        domain(path).examples()
    path.write_text("\n".join([*lines[:150], '"how" ?,yes,no,p', *lines[150:]]) + "\n")
    assert (domain(path).readings[0].kept, domain(path).readings[0].malformed) == (200, ("line 151",))


def test_a_name_of_two_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer,refusal,category,answer\nq,yes,no,c,other\n")
    with pytest.raises(ValueError, match=r"a\.csv: has several columns answer"):
        domain(path).examples()


def test_signs_of_a_file_name_are_no_pattern(tmp_path: Path) -> None:
    expected = domain(write(tmp_path / "a.parquet")).examples()
    assert len(expected) == len(ROWS)
    assert domain(write(tmp_path / "[a]*.parquet", ROWS)).examples() == expected


def test_names_of_columns_are_for_csv_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    for place, message in (
        (tmp_path / "train.jsonl", r"train\.jsonl names its columns itself"),
        (tmp_path, "which CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            Rows(path=str(place), columns=("prompt",)).read({"prompt"})


def test_an_empty_path_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl")
    for path in ("", " "):
        with pytest.raises(ValueError, match="no such file"):
            Rows(path=path)


def test_one_prompt_has_one_object_however_it_is_spelled(tmp_path: Path) -> None:
    rows = [{**row, "about": row["prompt"].split()[4]} for row in ROWS]
    again = [{**rows[0], "prompt": "HOW do I  make p0 ?", "about": name} for name in ("p0", "p1")]
    spoilt = domain(write(tmp_path / "a.jsonl", [*rows, *again]), object_column="about", malformed_share=0.1)
    assert spoilt.readings[0].malformed == ("line 34",)
    assert {example.object for example in spoilt.examples() if "p0" in example.prompt} == {"p0"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_an_empty_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    for content in ("", "\n", "prompt,answer\n" if suffix == ".csv" else "[]" if suffix == ".json" else "\n\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"a{suffix}: holds no rows"):
            domain(path).examples()


def test_an_empty_table_and_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in ROWS[0]}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a\.parquet: holds no rows"):
        domain(tmp_path / "a.parquet").examples()
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read"):
        domain(tmp_path / "b.jsonl").examples()
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read"):
        domain(tmp_path / "c.parquet").examples()


def test_a_table_by_columns_is_read_as_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}))
    assert domain(path).examples() == domain(write(tmp_path / "b.jsonl")).examples()
    path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    assert domain(path).examples() == domain(tmp_path / "b.jsonl").examples()


def test_files_of_a_folder_are_read_one_after_the_other_without_headers(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text('"first, with a comma"\nsecond\n')
    (tmp_path / "two.csv").write_text("third\n")
    rows = Rows(path=str(tmp_path), files=("one.csv", "two.csv"), columns=("prompt",)).read({"prompt", "file"})
    assert [(row.values["file"], row.values["prompt"]) for row in rows] == [
        ("one", "first, with a comma"),
        ("one", "second"),
        ("two", "third"),
    ]
    assert [row.place for row in rows] == ["one.csv line 1", "one.csv line 2", "two.csv line 1"]
    with pytest.raises(ValueError, match=r"has no file three\.csv"):
        Rows(path=str(tmp_path), files=("three.csv",)).read({"prompt"})
    all_files = Rows(path=str(tmp_path), files=("*.csv",), columns=("prompt",)).read({"prompt"})
    assert [row.values for row in all_files] == [row.values for row in rows]
    for outside in ("../one.csv", "/one.csv"):
        with pytest.raises(ValueError, match="must lie below"):
            Rows(path=str(tmp_path), files=(outside,))


def test_a_commit_is_required_and_nothing_else_passes_for_one() -> None:
    with pytest.raises(
        ValueError, match=r"commit=null: a/b is read at a commit.*huggingface\.co/datasets/a/b/commits/main"
    ):
        Rows(id="a/b")
    for name in ("main", COMMIT[:7], COMMIT.upper()):
        with pytest.raises(ValueError, match="must be the 40 hexadecimal digits"):
            Rows(id="a/b", commit=name)
    with pytest.raises(ValueError, match="path=null: give a file"):
        Rows()


def repository(folder: Path) -> Path:
    """A repository of the hub as a folder: two subsets, by its card's own words."""
    folder.mkdir(parents=True)
    card = "---\nconfigs:\n"
    for subset in ("main", "other"):
        card += f"- config_name: {subset}\n  data_files:\n"
        for split in ("train", "test"):
            card += f"  - split: {split}\n    path: {subset}_{split}.jsonl\n"
            write(folder / f"{subset}_{split}.jsonl", [{"prompt": f"{subset} {split} {n}"} for n in range(3)])
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_a_folder_laid_out_like_a_repository_is_read_by_subset_and_split(tmp_path: Path) -> None:
    place = str(repository(tmp_path / "copy"))
    rows = Rows(path=place, subset="other", split="test").read({"prompt"})
    assert [row.values["prompt"] for row in rows] == [f"other test {n}" for n in range(3)]
    with pytest.raises(ValueError, match="cannot be read"):
        Rows(path=place, subset="other", split="validation").read({"prompt"})


OFFLINE = """
import sys, time
from immunize.data.rows import Rows
commit, begun = sys.argv[1], time.perf_counter()
for part in ({"subset": "main", "split": "test"}, {"files": ("other_train.jsonl",)}):
    print([row.values["prompt"] for row in Rows(id="own/data", commit=commit, **part).read({"prompt"})])
read = time.perf_counter()
for name, wanted in (("own/data", commit[::-1]), ("own/missing", commit)):
    try:
        Rows(id=name, commit=wanted).read({"prompt"})
    except ValueError as error:
        print(error)
print(time.perf_counter() - read < 2)
"""


def test_offline_the_cached_commit_is_read_and_no_other_passes_for_it(tmp_path: Path) -> None:
    repository(tmp_path / "hub" / "datasets--own--data" / "snapshots" / COMMIT)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, COMMIT], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str([f"main test {n}" for n in range(3)])
    assert lines[1] == str([f"other train {n}" for n in range(3)])
    assert f"own/data: HF_HUB_OFFLINE is set, and commit {COMMIT[::-1]} is not in the cache" in lines[2]
    assert f"own/missing: HF_HUB_OFFLINE is set, and commit {COMMIT} is not in the cache" in lines[3]
    assert lines[4] == "True"


ANSWERED = """
import os, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}
ANSWERS |= {"moved": (404, "RevisionNotFound"), "ill": (503, "")}

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code = ANSWERS[self.path.split("/")[4]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from immunize.data.rows import Rows
begun = time.perf_counter()
for name in ANSWERS:
    try:
        Rows(id=f"own/{name}", commit="0" * 40).read({"prompt"})
    except ValueError as error:
        print(error)
print(time.perf_counter() - begun < 5)
"""


def test_what_the_hub_answers_is_told_apart(tmp_path: Path) -> None:
    """Against a small server of our own; `ill` is a hub that is down, for which the cache decides."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED],
        capture_output=True,
        text=True,
        env={**environment, "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    missing, gated, moved, ill, quick = done.stdout.splitlines()
    assert "own/missing: the hub has no such data set" in missing
    assert "own/gated: its owners grant access by hand" in gated
    assert f"own/moved: has no commit {'0' * 40}" in moved
    assert f"own/ill: the hub cannot be reached, and commit {'0' * 40} is not in the cache" in ill
    assert quick == "True"
