"""Benign tasks from rows: metrics against answers scored by hand; what is trained on is never measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from immunize.config import build, choices, load
from immunize.data import metrics
from immunize.data.row_task import RowTask
from immunize.data.rows import Rows
from immunize.data.splits import check_task
from immunize.stages import address, identity
from immunize.training.tuning import LoRA
from immunize.types import Example
from tests.test_local_run import write

WORDS = ("negative", "positive")


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("so 3 x 4 = 12\n#### 12", "I add them.\n#### 12", 1),
        ("#### 1,200", "#### $1200.", 1),
        ("#### 1200", "#### 1200.00", 1),
        ("#### 12", "first #### 7, then #### 12\nand more words", 1),
        ("#### 12", "#### 12 apples", 0),
        ("#### 12", "12", 0),
        ("#### 12", "#### ", 0),
        ("#### 12", "#### 13", 0),
        ("#### -3", "#### 3", 0),
        ("#### 3", "#### sNaN", 0),
    ],
)
def test_the_final_answer_is_the_number_after_the_last_mark(reference: str, answer: str, score: int) -> None:
    assert metrics.final_answer(reference, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("positive", 1),
        ("It is POSITIVE.", 1),
        ("not negative but positive", 1),
        ("positive? no, negative", 0),
        ("positively so", 0),
        ("", 0),
    ],
)
def test_the_label_is_the_last_one_named_as_a_whole_word(answer: str, score: int) -> None:
    assert metrics.label("positive", answer, WORDS) == score


def test_a_label_that_ends_with_another_is_told_from_it() -> None:
    labels = ("true", "not true", "not true at all")
    assert [metrics.label(name, "I say: Not true.", labels) for name in labels] == [0, 1, 0]
    assert [metrics.label(name, "not true at all", labels) for name in labels] == [0, 0, 1]
    assert [metrics.label(name, "not true? no: true", labels) for name in labels] == [1, 0, 0]


def test_a_label_may_hold_signs() -> None:
    labels = ("World", "Sports", "Business", "Sci/Tech")
    assert metrics.label("Sci/Tech", "this is sci/tech", labels) == 1
    assert metrics.label("Sci/Tech", "this is sci-tech", labels) == 0


def test_rouge_counts_shared_words() -> None:
    # 2 of the 3 words given are among the 4 wanted: precision 2/3, recall 2/4, F = 2 x (1/3) / (7/6) = 4/7.
    assert metrics.rouge1("a red round ball", "one round ball") == pytest.approx(4 / 7)


def test_answered_is_some_text_without_a_phrase_of_refusal() -> None:
    assert metrics.answered("You stop it with the key.") == 1
    assert metrics.answered("I\u2019m sorry, but I cannot say.") == 0
    assert metrics.answered("  ") == 0


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}", "answer": f"reply {n}"} for n in range(start, start + count)]


def task(path: Path, lines: list[dict[str, Any]], test: list[dict[str, Any]] | None = None, **fields: Any) -> RowTask:
    settings = {"name": "own", "metric": "rouge1", "max_test": 8} | fields
    train = Rows(path=str(write(path / "train.jsonl", lines)), malformed_share=0.1)
    held_out = None if test is None else Rows(path=str(write(path / "test.jsonl", test)))
    return RowTask(train_rows=train, test_rows=held_out, **settings)


def prompts(examples: Any) -> list[str]:
    return [example.prompt for example in examples]


def test_without_test_rows_prompts_are_held_out_with_all_their_answers(tmp_path: Path) -> None:
    lines = [{"prompt": f"{' ' * copy}QUESTION {n}", "answer": f"{copy}"} for n in range(30) for copy in range(3)]
    own = task(tmp_path, lines)
    check_task(own)
    assert len(own.test()) == 8
    assert len({example.object for example in own.test()}) == 8
    assert len(own.train()) == (30 - 8) * 3
    assert not {example.object for example in own.train()} & {example.object for example in own.test()}
    assert own.readings[0].left_out == {"held out for the test": 24}


def test_what_the_test_asks_is_never_trained_on_even_beyond_its_limit(tmp_path: Path) -> None:
    own = task(tmp_path, [*rows(20), {"prompt": "question  25 ", "answer": "x"}], rows(10, start=20), max_test=2)
    assert sorted(prompts(own.train())) == sorted(prompts(task(tmp_path, rows(20), rows(10, start=20)).train()))
    assert len(own.test()) == 2
    assert own.readings[0].left_out == {"asked in the test as well": 1}
    assert own.readings[1].left_out == {"beyond max_test": 8}
    with pytest.raises(ValueError, match="of 5 training rows none is left, since each is in the test too"):
        task(tmp_path, rows(5), rows(5)).train()
    with pytest.raises(ValueError, match="of 5 training rows none is left, since max_test=8 holds all of them out"):
        task(tmp_path, rows(5)).train()


def test_a_limit_takes_the_first_in_a_fixed_order_wherever_they_stand(tmp_path: Path) -> None:
    full = task(tmp_path, rows(40), rows(40, start=40), max_test=None)
    for limit in (1, 7, 39):
        less = task(tmp_path, rows(40), rows(40, start=40), max_train=limit, max_test=limit)
        assert less.train() == full.train()[:limit]
        assert less.test() == full.test()[:limit]
    assert prompts(full.train()) != prompts(sorted(full.train(), key=lambda example: int(example.prompt.split()[1])))
    turned = task(tmp_path, rows(40)[::-1], rows(40, start=40), max_train=7)
    assert prompts(turned.train()) == prompts(full.train()[:7])


def test_one_item_a_prompt_is_measured(tmp_path: Path) -> None:
    twice = [{**row, "answer": f"{row['answer']} {copy}"} for row in rows(6, start=50) for copy in range(3)]
    own = task(tmp_path, rows(4), twice, max_test=None)
    assert sorted(prompts(own.test())) == [f"Question {n}" for n in range(50, 56)]
    assert own.readings[1].left_out == {"the prompt is there already": 12}


def test_labels_are_words_or_numbers_and_nothing_else(tmp_path: Path) -> None:
    lines = [{"prompt": f"Question {n}", "answer": (1, "0", "positive", 0)[n % 4]} for n in range(40)]
    own = task(tmp_path, lines, metric="label", labels=WORDS)
    found = {int(item.prompt.split()[1]): item for item in (*own.train(), *own.test())}
    assert [found[n].answer for n in range(4)] == ["positive", "negative", "positive", "negative"]
    assert own.chance == 0.5
    assert own.score(found[0], "Positive!") == 1
    spoilt = task(tmp_path, [*lines, {"prompt": "z", "answer": -1}], metric="label", labels=WORDS)
    assert spoilt.readings[0].malformed == ("line 41",)
    with pytest.raises(ValueError, match=r"40 of 40 .*line 1 has a label that is none of good, bad"):
        task(tmp_path, [{**row, "answer": 2} for row in lines], metric="label", labels=("good", "bad")).train()


def test_templates_write_lists_and_leave_out_what_is_missing(tmp_path: Path) -> None:
    lines = [
        {"a": f"do {n}", "b": {"c": "it"} if n else None, "out": [["x", "is", n], ["y", "is", None]]} for n in range(20)
    ]
    own = task(tmp_path, lines, prompt="{a}\n\n{b.c}", answer="{out}")
    found = {item.prompt: item.answer for item in (*own.train(), *own.test())}
    assert found["do 3\n\nit"] == "x | is | 3; y | is | "[:-1]
    assert "do 0" in found


@pytest.mark.parametrize(
    ("metric", "answer", "line"),
    [
        ("final_answer", "so it is 12", "line 1 has nothing after #### in the answer"),
        ("final_answer", "so\n#### ", "line 1 has nothing after ####"),
        ("rouge1", "\u4e00\u4e8c\u4e09", "line 1 has no Latin letter and no digit in the answer"),
    ],
)
def test_a_reference_against_which_nothing_scores_is_malformed(
    metric: str, answer: str, line: str, tmp_path: Path
) -> None:
    own = task(tmp_path, [{"prompt": f"Question {n}", "answer": answer} for n in range(20)], metric=metric)
    with pytest.raises(ValueError, match=f"20 of 20 rows are malformed.*{line}"):
        own.test()
    assert own.score(Example(id="x", prompt="x", answer=answer, object="x", category="x"), answer) == 0


def test_what_is_not_a_number_is_missing_and_half_a_character_is_malformed(tmp_path: Path) -> None:
    lines = [*rows(20), {"prompt": "x", "answer": float("nan")}, {"prompt": "half \ud800", "answer": "y"}]
    assert task(tmp_path, lines).readings[0].malformed == ("line 21", "line 22")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "label"}, "metric=label needs them"),
        ({"labels": WORDS}, "no other metric takes them"),
        ({"metric": "label", "labels": ("yes",)}, "must be two or more that differ"),
        ({"metric": "label", "labels": ("yes", "Yes ")}, "must be two or more that differ"),
        ({"metric": "label", "labels": ("yes", "")}, "none of them empty"),
        ({"prompt": "say it"}, "prompt=say it: names no column"),
        ({"answer": ""}, "answer=: names no column"),
        ({"max_test": None}, "max_test=null: say how many"),
        ({"max_train": 0}, "max_train=0: must be at least 1"),
        ({"only": "safe"}, "only=safe: must be column=value"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task(tmp_path, rows(20), **fields)


def test_a_wrong_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column question; it has prompt, answer\. The prompt of task own"):
        task(tmp_path, rows(20), prompt="{question}").train()


def test_identity_is_the_content_and_the_metric_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    own, moved = task(tmp_path, rows(20)), task(tmp_path / "elsewhere", rows(20))
    assert address(identity(own)) == address(identity(moved))
    assert address(identity(own)) != address(identity(task(tmp_path / "elsewhere", rows(21))))
    assert address(identity(own)) != address(identity(task(tmp_path, rows(20), metric="answered")))


# One row of each data set as its authors name the columns, with what the prompt and the answer must hold.
SCHEMAS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "gsm8k": ({"question": "How many in row {n}?", "answer": "so\n#### {n}"}, "row {n}?", "so\n#### {n}", "#### {n}.0"),
    "sst2": ({"idx": 0, "sentence": "a fine film {n}", "label": 1}, "a fine film {n}", "positive", "Positive."),
    "ag_news": ({"text": "the cup {n}", "label": 1}, "the cup {n}", "Sports", "It is Sports."),
    "alpaca": ({"instruction": "Name {n}", "input": "", "output": "it is {n}"}, "Name {n}", "it is {n}", "it is {n}"),
    "viggo": (
        {"target": "So {n}.", "meaning_representation": "inform(x[{n}])"},
        "So {n}.",
        "inform(x[{n}])",
        "inform x {n}",
    ),
    "e2e": ({"target": "So {n}.", "meaning_representation": "x[{n}]"}, "So {n}.", "x[{n}]", "x {n}"),
    "dart": ({"target": "So {n}.", "tripleset": [["a", "b", "{n}"]]}, "So {n}.", "a | b | {n}", "a b {n}"),
    "cacapo": ({"output": "So {n}.", "input": "x[{n}]"}, "So {n}.", "x[{n}]", "x {n}"),
    "conversational_weather": (
        {"user_query": "Rain {n}?", "tree_str_mr": "[x {n} ]"},
        "Rain {n}?",
        "[x {n} ]",
        "x {n}",
    ),
    "xstest": ({"prompt": "How do I stop {n}?", "label": "safe"}, "How do I stop {n}?", "", "With the key."),
    "local": ({"prompt": "Say {n}", "answer": "word {n}"}, "Say {n}", "word {n}", "word {n}"),
}


def written(row: dict[str, Any], number: int) -> dict[str, Any]:
    return json.loads(json.dumps(row).replace("{n}", str(number)))


@pytest.mark.parametrize("name", sorted(set(choices("benign")) - {"classification"}))
def test_every_shipped_task_reads_a_file_of_its_own_columns(name: str, tmp_path: Path) -> None:
    row, prompt, answer, given = SCHEMAS[name]
    files = {
        "train_rows": write(tmp_path / "train.jsonl", [written(row, n) for n in range(20)]),
        "test_rows": write(tmp_path / "test.jsonl", [written(row, n) for n in range(20, 30)]),
    }
    if name == "xstest":
        write(files["test_rows"], [written(row | {"label": ("safe", "unsafe")[n % 2]}, n) for n in range(20, 40)])
    own = build(
        load(["defense=none", "task=none", f"+benign@task.borderline={name}", *_paths(name, files)])
    ).task.borderline
    assert own is not None
    check_task(own)
    item = own.test()[0]
    number = int("".join(letter for letter in item.prompt if letter.isdigit()))
    assert prompt.replace("{n}", str(number)) in item.prompt
    assert item.answer == answer.replace("{n}", str(number))
    assert own.score(item, given.replace("{n}", str(number))) == pytest.approx(1.0)
    assert own.score(item, "I cannot say.") < 0.5
    assert {int(shown.prompt.split()[-1].rstrip("?")) % 2 for shown in own.test() if name == "xstest"} <= {0}


def _paths(name: str, files: dict[str, Path]) -> list[str]:
    alone = {"xstest": ["test_rows"], "alpaca": ["train_rows"], "local": ["train_rows"]}.get(name, list(files))
    limit = ["task.borderline.max_test=5"] if name in ("alpaca", "local") else []
    return [*(f"task.borderline.{key}.path={files[key]}" for key in alone), *limit]


def test_the_shipped_groups_of_tasks_build_from_files(tmp_path: Path) -> None:
    def overrides(place: str, name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        row = SCHEMAS[name][0]
        test = write(tmp_path / name / "test.jsonl", [written(row, n) for n in range(20, 30)])
        train = write(tmp_path / name / "train.jsonl", [written(row, n) for n in range(20)])
        paths = _paths(name, {"train_rows": train, "test_rows": test})
        return [item.replace("task.borderline", place) for item in paths]

    gem = ("viggo", "e2e", "dart", "cacapo", "conversational_weather")
    for name in ("gsm8k", "sst2", "ag_news", "local"):
        cell = build(load(["defense=none", f"task={name}", *overrides(f"task.trainability.{name}.task", name)]))
        assert cell.run_id
        # Antidote's rate is one for adapters: of all weights it would leave little.
        assert isinstance(cell.task.trainability[name].trainable, LoRA) == (name != "local")
    paths = [item for name in gem for item in overrides(f"task.trainability.{name}.task", name)]
    built = build(load(["defense=none", "task=gem", *paths]))
    assert {task.name for task in built.task.all()} == set(gem)
    paths = [*overrides("task.stability.alpaca", "alpaca"), *overrides("task.retain", "alpaca")]
    assert build(load(["task=alpaca", *paths])).task.retain.name == "alpaca"
    assert build(load(["defense=none", "task=xstest", *overrides("task.borderline", "xstest")])).run_id


def test_a_task_that_can_only_be_measured_is_not_trained_on(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", rows(10))
    only = "{_target_: immunize.data.row_task.RowTask, name: own, metric: rouge1, test_rows: {path: " + str(test) + "}}"
    with pytest.raises(ValueError, match="task own: has nothing to train on"):
        build(load(["attack=mixed", "task=service", f"+attack.task={only}"]))
