"""Benchmarks on a model in memory: lm-eval on local task files, and perplexity, against log-likelihoods summed here."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from immunize.benchmarks.harness import Harness
from immunize.benchmarks.perplexity import Perplexity
from immunize.config import build, load
from immunize.data.benchmark import load_report, save_report
from immunize.models.loading import ChatModel
from immunize.stages import address, identity
from immunize.types import Kind
from tests.test_local_run import write

TASK = """
task: fruit
dataset_path: json
dataset_kwargs: {data_files: {test: rows/fruit.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3.0}
"""
CHOICES = ["an apple", "a", "the other answers are apples"]
ROWS = [{"question": f"which is fruit {n} ?", "choices": CHOICES, "label": n % 3} for n in range(24)]
WRITTEN = """
include: fruit.yaml
task: writing
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: all, filter: [{function: regex, regex_pattern: "(?s)(.*)", group_select: 0}, {function: take_first}]}
  - {name: never, filter: [{function: regex, regex_pattern: "no such words"}, {function: take_first}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two task files with their data beside them."""
    place = tmp_path / "tasks"
    (place / "rows").mkdir(parents=True)
    (place / "fruit.yaml").write_text(TASK)
    (place / "writing.yaml").write_text(WRITTEN)
    write(place / "rows" / "fruit.jsonl", ROWS)  # type: ignore[arg-type]
    return place


def harness(place: Path, *tasks: str, **fields: Any) -> Harness:
    return Harness(tasks=tasks or ("fruit",), path=str(place), **fields)


def log_likelihood(chat: ChatModel, context: str, continuation: str) -> float:
    """The sum over the continuation's tokens, one forward pass without padding."""
    head = chat.tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = chat.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    assert whole[: len(head)] == head
    with torch.no_grad():
        log_p = chat.network(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[at - 1, whole[at]]) for at in range(len(head), len(whole)))


def right(chat: ChatModel, row: dict[str, Any], *, context: str = "", by_length: bool) -> float:
    values = [
        log_likelihood(chat, f"{context}{row['question']}\nAnswer:", f" {choice}") / (len(choice) if by_length else 1)
        for choice in row["choices"]
    ]
    return float(max(range(len(values)), key=values.__getitem__) == row["label"])


@pytest.mark.parametrize(("metric", "by_length"), [(None, True), ("acc_norm", True), ("acc", False)])
def test_scores_are_those_of_the_likeliest_choice(
    metric: str | None, by_length: bool, folder: Path, make_chat: Callable[..., ChatModel]
) -> None:
    """acc_norm divides by the characters of a choice, and is what is taken where nothing is said."""
    chat = make_chat()
    report = harness(folder, metric=metric).measure(chat, batch_size=5)
    (found,) = report.measured
    assert list(found.scores) == [right(chat, row, by_length=by_length) for row in ROWS]
    assert 0 < fmean(found.scores) < 1, "a task that tells nothing apart tests nothing"
    assert found.metric == "score" and found.items.kind is Kind.BENCHMARK and found.items.name == "fruit"
    assert found.items.chance == pytest.approx(1 / 3)
    assert len(set(found.items.ids)) == len(set(found.items.objects)) == 24
    shown = "acc_norm" if by_length else "acc"
    assert report.about == {
        "fruit": {
            "lm_eval": "0.4.13",
            "tasks": {"fruit": {"metric": shown, "filter": "none", "num_fewshot": 0, "version": 3.0}},
        }
    }


def test_the_two_metrics_differ_here(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    chat = make_chat()
    found = [harness(folder, metric=name).measure(chat, batch_size=8).measured[0] for name in ("acc", "acc_norm")]
    assert found[0].scores != found[1].scores and found[0].items == found[1].items


def test_a_report_is_kept_as_it_is_without_text(
    folder: Path, make_chat: Callable[..., ChatModel], tmp_path: Path
) -> None:
    report = harness(folder, "fruit", "writing", limit=6).measure(make_chat(), batch_size=4)
    save_report(tmp_path, report)
    assert load_report(tmp_path) == report
    kept = "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    assert "apple" not in kept and "which is" not in kept and str(tmp_path) not in kept
    assert [len(item.scores) for item in report.measured] == [6, 6]
    assert report.measured[1].items.chance == 0.0
    assert report.about["writing"]["tasks"]["writing"]["filter"] == "all", "the first of several ways to filter"


def test_the_chat_template_is_used_where_asked_for(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    """The context is then the whole conversation up to the answer, and the choice follows without a space."""
    chat = make_chat()
    (found,) = harness(folder, chat_template=True, metric="acc").measure(chat, batch_size=8).measured
    expected = []
    for row in ROWS:
        context = f"<user>{row['question']}\nAnswer:<assistant>"
        values = [log_likelihood(chat, context, choice) for choice in CHOICES]
        expected.append(float(max(range(3), key=values.__getitem__) == row["label"]))
    assert list(found.scores) == expected


def test_shots_come_before_the_question_unless_the_task_fixes_none(
    folder: Path, make_chat: Callable[..., ChatModel]
) -> None:
    (folder / "fixed.yaml").write_text("include: fruit.yaml\ntask: fixed\nnum_fewshot: 0\n")
    (folder / "first.yaml").write_text(
        "include: fruit.yaml\ntask: first\nfewshot_split: test\nfewshot_config: {sampler: first_n}\n"
    )
    chat = make_chat()
    report = harness(folder, "fixed", "first", num_fewshot=1, limit=8, metric="acc").measure(chat, batch_size=4)
    shots = {name: report.about[name]["tasks"][name]["num_fewshot"] for name in ("fixed", "first")}
    assert shots == {"fixed": 0, "first": 1}
    example = f"{ROWS[0]['question']}\nAnswer: {CHOICES[0]}\n\n"
    after = [right(chat, row, context=example, by_length=False) for row in ROWS[1:8]]
    assert list(report.measured[1].scores[1:]) == after  # the first item would be shown itself


def test_it_leaves_the_random_state_and_the_weights_alone(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    chat = make_chat()
    before = [parameter.clone() for parameter in chat.network.parameters()]
    torch.manual_seed(7)
    harness(folder, limit=4).measure(chat, batch_size=4)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(one, other) for one, other in zip(before, chat.network.parameters(), strict=True))


def test_rows_that_change_are_read_anew(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    """With their size and time as before, by which a cache could take them for the old ones."""
    chat, place = make_chat(), folder / "rows" / "fruit.jsonl"
    (before,) = harness(folder, limit=4).measure(chat, batch_size=4).measured
    times = place.stat().st_atime_ns, place.stat().st_mtime_ns
    place.write_text(place.read_text().replace("which is", "where is"))
    os.utime(place, ns=times)
    (after,) = harness(folder, limit=4).measure(chat, batch_size=4).measured
    assert before.items.ids == after.items.ids
    assert not set(before.items.objects) & set(after.items.objects)


def test_identity_is_what_the_task_files_hold_not_where_they_lie(folder: Path, tmp_path: Path) -> None:
    first = address(identity(harness(folder)))
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, moved)
    assert address(identity(harness(moved))) == first
    assert str(tmp_path) not in json.dumps(identity(harness(moved)))
    (moved / "writing.yaml").write_text(WRITTEN.replace("max_gen_toks: 4", "max_gen_toks: 5"))
    assert address(identity(harness(moved))) == first, "another task's file is no part of it"
    write(moved / "rows" / "fruit.jsonl", ROWS[1:])  # type: ignore[arg-type]
    other_rows = address(identity(harness(moved)))
    (moved / "fruit.yaml").write_text(TASK.replace("Answer:", "Reply:"))
    other_prompt = address(identity(harness(moved)))
    (moved / "code.py").write_text("def doc(row): return row")
    assert len({first, other_rows, other_prompt, address(identity(harness(moved)))}) == 4
    assert identity(harness(folder))["lm_eval"] == "0.4.13"
    assert len({address(identity(harness(folder, **more))) for more in ({}, {"limit": 5}, {"metric": "acc"})}) == 3


def test_a_group_counts_as_one_task_each_item_alike(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    """24 items with three choices and 4 with two: a guess scores (24 / 3 + 4 / 2) / 28 = 10 / 28."""
    write(folder / "rows" / "two.jsonl", [{**row, "choices": CHOICES[:2], "label": 0} for row in ROWS[:4]])  # type: ignore[misc]
    (folder / "two.yaml").write_text(
        "include: fruit.yaml\ntask: two\ntag: small\ndataset_kwargs: {data_files: {test: rows/two.jsonl}}\n"
    )
    (folder / "both.yaml").write_text("group: both\ntask: [fruit, small]\n")
    chat = make_chat()
    report = harness(folder, "both", "two").measure(chat, batch_size=4)
    both, two = report.measured
    (fruit,) = harness(folder).measure(chat, batch_size=4).measured
    assert both.scores == (*fruit.scores, *two.scores) and len(both.scores) == 28
    assert both.items.chance == pytest.approx(10 / 28)
    assert both.items.ids == (*fruit.items.ids, *two.items.ids)
    assert set(report.about["both"]["tasks"]) == {"fruit", "two"}
    before = address(identity(harness(folder, "both")))
    (folder / "both.yaml").write_text("group: both\ntask: [fruit]\n")
    assert address(identity(harness(folder, "both"))) != before
    (folder / "both.yaml").write_text("group: both\ntask: [fruit, mmlu]\n")
    with pytest.raises(ValueError, match="tasks=mmlu: a group of the folder names it, and no task file there does"):
        harness(folder, "both").check()


def test_functions_beside_a_task_file_are_run(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    (folder / "code.py").write_text("def few(rows): return rows.select(range(3))\n")
    (folder / "coded.yaml").write_text("include: fruit.yaml\ntask: coded\nprocess_docs: !function code.few\n")
    own = harness(folder, "coded")
    assert "code.few" in json.dumps(identity(own))
    assert len(own.measure(make_chat(), batch_size=4).measured[0].scores) == 3


def test_a_shipped_task_file_reads_local_data(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    """arc_easy as it is, but for where its rows lie."""
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    splits = "test_split: test\ntraining_split: null\nvalidation_split: null\ndataset_name: null\n"
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows/arc.jsonl}}\n"
    (folder / "arc.yaml").write_text(f"include: {shipped}\ntask: arc_here\n{data}{splits}")
    letters = ["A", "B", "C"]
    rows: list[Any] = [
        {"question": f"fruit {n}?", "choices": {"text": CHOICES, "label": letters}, "answerKey": letters[n % 3]}
        for n in range(9)
    ]
    write(folder / "rows" / "arc.jsonl", rows)
    report = harness(folder, "arc_here").measure(make_chat(), batch_size=4)
    assert report.about["arc_here"]["tasks"]["arc_here"]["metric"] == "acc_norm"
    assert len(report.measured[0].scores) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, r"tasks=\[\]: name at least one"),
        ({"tasks": ("fruit", "fruit")}, "names one twice"),
        ({"tasks": ("fruit",), "limit": 0}, "limit=0: must be at least 1"),
        ({"tasks": ("fruit",), "num_fewshot": -1}, "num_fewshot=-1: must not be negative"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Harness(**fields)


def test_what_is_missing_is_said_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"tasks=fruits: no task of .*, which has fruit, writing; shipped tasks"):
        harness(folder, "fruits").check()
    with pytest.raises(ValueError, match="no such folder"):
        harness(folder / "none").check()
    (folder / "rows" / "fruit.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tasks=fruit: its data_files name rows/fruit\.jsonl, and there is no such"):
        harness(folder).check()
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    given = ["benchmark=harness", "task.benchmarks.harness.tasks=[mmlu]"]
    with pytest.raises(ValueError) as caught:
        build(load(given))
    assert str(caught.value) == (
        "task.benchmarks.harness.tasks=['mmlu']: needs lm-eval; pip install 'immunize[benchmarks]' brings it"
    )


def test_a_metric_that_is_no_score_of_each_item_is_refused(folder: Path, make_chat: Callable[..., ChatModel]) -> None:
    with pytest.raises(ValueError, match="fruit: has no metric f1; it has acc, acc_norm"):
        harness(folder, metric="f1").measure(make_chat(), batch_size=4)
    rolling = 'task: rolling\noutput_type: loglikelihood_rolling\ndoc_to_target: "{{question}}"\n'
    (folder / "rolling.yaml").write_text(f"include: fruit.yaml\n{rolling}metric_list: [{{metric: word_perplexity}}]\n")
    with pytest.raises(ValueError, match="rolling: of word_perplexity, less is better"):
        harness(folder, "rolling", limit=2).measure(make_chat(), batch_size=4)
    (folder / "mcc.yaml").write_text("include: fruit.yaml\ntask: mcc\nmetric_list: [{metric: mcc}]\n")
    with pytest.raises(ValueError, match=r"mcc: its mcc gives items no score in \[0, 1\]"):
        harness(folder, "mcc", limit=2).measure(make_chat(), batch_size=4)


def test_the_tasks_of_repnoises_table_are_known_and_near_names_are_listed() -> None:
    """Reads the library's own index of tasks, which takes its time."""
    built = build(load(["benchmark=repnoise_table3"]))
    assert built.task.benchmarks["repnoise_table3"].names == (
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "mmlu",
        "hellaswag",
        "winogrande",
        "arc_easy",
    )
    with pytest.raises(ValueError, match=r"tasks=mmlo: no task of lm-eval 0\.4\.13 \(did you mean mmlu, "):
        build(load(["benchmark=harness", "task.benchmarks.harness.tasks=[hellaswag,mmlo]"]))


# Perplexity


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"the answer {n} is an apple \u00e9 {n * n}\n" for n in range(40)), encoding="utf-8")
    return path


def test_perplexity_is_minus_the_mean_loss_of_each_window(text: Path, make_chat: Callable[..., ChatModel]) -> None:
    """Without a token that begins a text, the first token of a window is not predicted."""
    chat = make_chat()
    assert chat.tokenizer.bos_token_id is None
    (found,) = Perplexity(path=str(text), window=10).measure(chat, batch_size=7).measured
    ids = chat.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 10] for start in range(0, len(ids) - 9, 10)]
    assert len(windows) == len(ids) // 10 == len(found.scores) and len(ids) % 10
    for window, score in zip(windows, found.scores, strict=True):
        with torch.no_grad():
            log_p = chat.network(torch.tensor([window])).logits[0].log_softmax(-1)
        expected = fmean(float(log_p[at - 1, window[at]]) for at in range(1, 10))
        assert score == pytest.approx(expected, rel=1e-5)
    assert found.metric == "minus_loss" and found.items.kind is Kind.TEXT
    assert found.items.chance == pytest.approx(-5.768321)  # -ln 320
    assert len(set(found.items.objects)) == len(windows)


def test_a_window_follows_the_token_that_begins_a_text(text: Path) -> None:
    from immunize.models.loading import load as load_model

    chat = load_model(build(load(["defense=none"])).model, device="cpu")
    begin = chat.tokenizer.bos_token_id
    (found,) = Perplexity(path=str(text), window=8, max_windows=3).measure(chat, batch_size=2).measured
    ids = chat.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert begin is not None and len(found.scores) == 3
    window = [begin, *ids[8:16]]
    with torch.no_grad():
        log_p = chat.network(torch.tensor([window])).logits[0].log_softmax(-1)
    assert found.scores[1] == pytest.approx(fmean(float(log_p[at - 1, window[at]]) for at in range(1, 9)), rel=1e-5)


def test_the_identity_of_a_text_is_its_content(text: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.txt"
    shutil.copy(text, moved)
    first = address(identity(Perplexity(path=str(text))))
    assert address(identity(Perplexity(path=str(moved)))) == first
    moved.write_text("something else")
    others = [Perplexity(path=str(moved)), Perplexity(path=str(text), window=9), Perplexity(path=str(text), name="own")]
    assert first not in {address(identity(other)) for other in others}


def test_a_text_that_cannot_be_measured_is_named(
    text: Path, tmp_path: Path, make_chat: Callable[..., ChatModel]
) -> None:
    chat = make_chat()
    with pytest.raises(ValueError, match=r"window=200: with 0 token\(s\) before it, longer than the 128"):
        Perplexity(path=str(text), window=200).measure(chat, batch_size=2)
    (tmp_path / "same.txt").write_text("a" * 100)
    with pytest.raises(ValueError, match=r"same\.txt has \d+ tokens, not 2 different windows of 4"):
        Perplexity(path=str(tmp_path / "same.txt"), window=4).measure(chat, batch_size=2)
    (tmp_path / "bytes.txt").write_bytes(b"ok \xff\xfe")
    with pytest.raises(ValueError, match=r"is no text in UTF-8 \(invalid start byte at byte 3\)"):
        Perplexity(path=str(tmp_path / "bytes.txt")).check()
    for fields, message in (
        ({"path": str(tmp_path / "none.txt")}, "no such file"),
        ({"path": str(text), "window": 1}, "window=1: must be at least 2"),
        ({"path": str(text), "max_windows": 1}, "max_windows=1: must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Perplexity(**fields)  # type: ignore[arg-type]
