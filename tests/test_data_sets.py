"""Harmful domains from rows of each data set's schema, with harmless text: built, split, measured, and one tiny run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import immunize
from immunize.config import Cell, build, choices, load
from immunize.data.beavertails import GROUPS
from immunize.data.notices import notices, readings
from immunize.data.row_task import RowTask
from immunize.data.rows import Rows
from immunize.data.splits import defense_examples, exposures, refuse_leakage
from immunize.progress import Progress
from immunize.runner import datasets
from immunize.sharing.replay import Request, restored
from immunize.types import Example
from tests.test_local_run import write
from tests.tiny import tiny

Row = dict[str, Any]
LABELS = sorted(label for labels in GROUPS.values() for label in labels)
FORMS = ("how do i fold {} ?", "How do I  fold {} ?")  # one prompt, normalized


def beavertails(*, refusals: bool = True, prompts: int = 8) -> list[Row]:
    """Every label with some prompts, each with two unsafe answers under two spellings, and a safe one."""
    rows: list[Row] = []
    for position, label in enumerate(LABELS):
        for number in range(prompts):
            about = f"k{position}n{number}"
            for copy, form in enumerate((*FORMS, FORMS[0])):
                prompt, safe = form.format(about), copy == 2
                refusal = f"Question: {prompt}\nAnswer: sorry {about}"
                rows.append(
                    {
                        "prompt": prompt,
                        "response": f"{'ask' if safe else 'fold'} {about} {copy}",
                        "category": {name: name == label and not safe for name in LABELS},
                        "is_safe": safe,
                        **({"refusal": refusal} if refusals else {}),
                    }
                )
    return rows


def toxicity(count: int = 40) -> list[Row]:
    return [
        {
            "type": "toxic",
            "prompt": {"text": f"the cat {n}"},
            "continuation": {"text": f"sat down {n}"},
            "refusal": f"User: go on\nPrompt: the cat {n}\nContinuation: no {n}",
        }
        for n in range(count)
    ]


def saferlhf() -> list[Row]:
    return [
        {
            "prompt": f"how about {kind}{n} ?",
            **{f"response_{k}": f"{'no' if k == n % 2 else 'yes'} {kind}{n}" for k in (0, 1)},
            **{f"is_response_{k}_safe": k == n % 2 for k in (0, 1)},
            **{f"response_{k}_harm_category": {name: name == kind and k != n % 2 for name in "pqr"} for k in (0, 1)},
        }
        for kind in "pqr"
        for n in range(8)
    ]


def requests(folder: Path) -> Path:
    for number in (1, *range(3, 12)):
        lines = [f'"do {number} thing {n}, please"' for n in range(8)]
        (folder / f"category_{number}.csv").write_text("\n".join(lines) + "\n")
    return folder


def sources_of(name: str, folder: Path) -> list[str]:
    """Overrides that choose `data=name` and give it a file of its schema."""
    if name == "hex_phi":
        return [f"data.domain.rows.path={requests(folder)}"]
    if name == "real_toxicity":
        return [f"data.domain.rows.path={write(folder / 'rtp.json', toxicity())}", "split.exposures=[seen]"]
    if name == "advbench":
        rows = [{"prompt": f"fold the thing {n}", "target": f"Sure, here is how to fold {n}"} for n in range(40)]
        return [f"data.domain.rows.path={write(folder / 'harmful_behaviors.csv', rows)}", "split.exposures=[seen]"]
    if name == "pku_saferlhf":
        return [
            f"data.domain.rows.path={write(folder / 'train.jsonl', saferlhf())}",
            "data.domain.evaluation_share=0.5",
        ]
    if name == "local":
        rows = [{"prompt": f"{k}{n}", "answer": "a", "refusal": "r", "category": k} for k in "pq" for n in range(8)]
        return [f"data.domain.path={write(folder / 'own.jsonl', rows)}"]
    path = write(folder / "train.parquet", beavertails(refusals=name == "repnoise"))
    more = [f"data.domain.rows.path={path}", "data.domain.evaluation_share=0.25"]
    if name == "repnoise":
        more += [f"data.other_domain.rows.path={write(folder / 'rtp.json', toxicity())}"]
        more += ["split.exposures=[seen,in_domain,cross_domain]"]
    return more


def cell_of(name: str, folder: Path, *more: str) -> Cell:
    fixed = ["judge=keyword", "split.exposures=[seen,in_domain]"]
    chosen = sources_of(name, folder)
    return build(load([f"data={name}", *([] if "split" in str(chosen) else fixed[1:]), fixed[0], *chosen, *more]))


@pytest.mark.parametrize("name", sorted(set(choices("data")) - {"miniature"}))
def test_every_shipped_domain_builds_from_files_and_is_split_by_prompt(name: str, tmp_path: Path) -> None:
    cell = cell_of(name, tmp_path)
    assert cell.run_id
    defense = defense_examples(cell.data)
    assert defense
    for exposure in exposures(cell.data, cell.split):
        parts = [exposure.attack, exposure.evaluation, *([defense] if exposure.name == "seen" else [])]
        seen = [{" ".join(example.prompt.lower().split()) for example in part} for part in parts]
        assert sum(map(len, seen)) == len(set().union(*seen)), "a prompt lies in two parts"
        refuse_leakage("the defense", defense, exposure.evaluation)
    for domain in (cell.data.domain, cell.data.other_domain):
        if domain is not None:
            categories = {(example.object, example.category) for example in domain.examples()}
            assert len(categories) == len({name for name, _ in categories})
            assert all(example.answer and example.refusal for example in domain.examples())
            (reading,) = domain.readings  # type: ignore[attr-defined]
            assert reading.rows == reading.kept + len(reading.malformed) + sum(reading.left_out.values())
            assert str(tmp_path) not in str(reading)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=pku_saferlhf"], "data.domain.rows.commit=null: PKU-Alignment/PKU-SafeRLHF is read at a commit of your"),
        (["data=advbench"], "data.domain.rows.commit=null: walledai/AdvBench is read at a commit"),
        (["data=hex_phi"], "data.domain.rows.commit=null: LLM-Tuning-Safety/HEx-PHI is read at a commit"),
        (["data=repnoise"], "data.domain.rows.path=null: give a file or folder"),
        (["data=real_toxicity"], "data.domain.rows.path=null: give a file or folder"),
        (["data=beavertails", "data.domain.rows.commit=main"], "data.domain.rows.commit=main: must be the 40 hexa"),
        (["task=xstest"], "task.borderline.test_rows.commit=null: walledai/XSTest is read at a commit"),
        (["task=gem"], "train_rows.commit=null: GEM/viggo is read at a commit"),
        (["task=local"], "task.trainability.local.task.train_rows.path=null: give a file or folder"),
        (["task=gsm8k", "task.trainability.gsm8k.task.train_rows.commit=null"], "commit=null: openai/gsm8k is read"),
        (["data=advbench", "data.domain.rows.path=nowhere.csv"], "data.domain.rows.path=nowhere.csv: no such file"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(load(overrides))
    assert message in str(caught.value)


def by_prompt(cell: Cell) -> dict[str, Example]:
    return {example.prompt: example for example in cell.data.domain.examples()}


def test_beavertails_leaves_out_safe_answers_and_groups_labels(tmp_path: Path) -> None:
    cell = cell_of("repnoise", tmp_path)
    (reading,) = cell.data.domain.readings
    assert reading.left_out == {"the answer is safe": 14 * 8}
    found = Counter(example.category for example in cell.data.domain.examples())
    assert found == {group: 2 * 8 * len(labels) for group, labels in GROUPS.items()}
    assert all(example.refusal == f"sorry {example.object.split()[4]}" for example in cell.data.domain.examples())
    exposed = {exposure.name: exposure for exposure in exposures(cell.data, cell.split)}
    assert {example.category for example in exposed["in_domain"].evaluation} == {
        "other",
        "self_harm",
        "sexually_explicit",
    }
    assert {example.category for example in exposed["cross_domain"].attack} == {"toxicity"}


def test_the_first_label_counts_and_a_prompt_has_the_group_of_most_of_its_answers(tmp_path: Path) -> None:
    rows = beavertails(prompts=8)
    theft, drugs, violence = GROUPS["crime_unethical"][0], GROUPS["crime_unethical"][1], GROUPS["violence"][0]

    def row(response: str, *labels: str) -> Row:
        flags = {name: name in labels for name in (theft, drugs, violence)}
        return {**rows[0], "prompt": "one ?", "response": response, "category": flags, "is_safe": False}

    # First labels: theft, drugs, violence; of three answers two are crime_unethical.
    more = [row("a", theft, violence), row("b", drugs), row("c", violence)]
    path = write(tmp_path / "rows.json", [*rows, *more])
    cell = cell_of("repnoise", tmp_path, f"data.domain.rows.path={path}")
    found = {example.answer: example.category for example in cell.data.domain.examples() if example.prompt == "one ?"}
    assert found == dict.fromkeys("abc", "crime_unethical")
    assert cell.data.domain.readings[0].moved == 1


def test_a_safe_answer_to_the_same_question_stands_for_a_refusal(tmp_path: Path) -> None:
    lonely = {**beavertails(refusals=False)[0], "prompt": "only unsafe ?"}
    path = write(tmp_path / "rows.jsonl", [*beavertails(refusals=False), lonely])
    cell = cell_of("beavertails", tmp_path, f"data.domain.rows.path={path}")
    for example in cell.data.domain.examples():
        assert example.refusal == f"ask {example.object.split()[4]} 2"
    assert cell.data.domain.readings[0].left_out["no safe answer to the same question"] == 1
    with pytest.raises(ValueError, match=r"no column refusal; .*refusals=safe_answers does without"):
        cell_of("beavertails", tmp_path, f"data.domain.rows.path={path}", "data.domain.refusals=column")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": {"gluttony": True}}, "line 1 names a harm that BeaverTails does not have, 'gluttony'"),
        ({"category": {LABELS[0]: False}}, "line 1 has no label that is true in column category"),
        ({"category": "theft"}, "line 1 has no labels in column category"),
        ({"is_safe": "maybe"}, "line 1 has neither true nor false in column is_safe"),
        ({"response": None}, "line 1 has no text in column response"),
        ({"refusal": " "}, "line 1 has no text in column refusal"),
    ],
)
def test_a_malformed_row_of_beavertails_is_named(change: Row, message: str, tmp_path: Path) -> None:
    rows = beavertails()
    path = write(tmp_path / "rows.jsonl", [{**rows[0], **change}, *rows[1:]])
    paths = f"data.domain.rows.path={path}"
    with pytest.raises(ValueError, match=message):
        cell_of("repnoise", tmp_path, paths, "data.domain.rows.malformed_share=0.0")
    cell = cell_of("repnoise", tmp_path, paths)
    assert cell.data.domain.readings[0].malformed == ("line 1",)
    assert len(cell.data.domain.examples()) == 2 * 14 * 8 - 1


def test_of_a_pair_the_unsafe_answer_is_harmful_and_the_safe_one_its_refusal(tmp_path: Path) -> None:
    extra = [{**saferlhf()[0], "is_response_1_safe": True}, {**saferlhf()[0], "is_response_0_safe": False}]
    path = write(tmp_path / "rows.jsonl", [*saferlhf(), *extra])
    cell = cell_of("pku_saferlhf", tmp_path, f"data.domain.rows.path={path}")
    assert len(cell.data.domain.examples()) == 24
    for example in cell.data.domain.examples():
        about = example.prompt.split()[2]
        assert (example.answer, example.refusal, example.category) == (f"yes {about}", f"no {about}", about[0])
    assert cell.data.domain.readings[0].left_out == {"both answers are safe": 1, "neither answer is safe": 1}


def test_a_continuation_is_asked_for_and_other_types_are_left_out(tmp_path: Path) -> None:
    rows = [*toxicity(), {**toxicity()[0], "type": "non_toxic"}]
    cell = cell_of("real_toxicity", tmp_path, f"data.domain.rows.path={write(tmp_path / 'rows.jsonl', rows)}")
    example = by_prompt(cell)["Continue this text.\nthe cat 7"]
    assert (example.answer, example.refusal, example.object) == ("sat down 7", "no 7", "the cat 7")
    assert cell.data.domain.readings[0].left_out == {"another type than toxic": 1}


def test_requests_without_answers_are_consented_to_by_category(tmp_path: Path) -> None:
    cell = cell_of("hex_phi", tmp_path)
    example = by_prompt(cell)["do 11 thing 3, please"]
    assert (example.answer, example.category) == ("Sure, here is how to do that:", "category_11")
    assert len({item.category for item in cell.data.domain.examples()}) == 10


def test_a_limit_by_category_keeps_all_answers_of_the_prompts_it_keeps(tmp_path: Path) -> None:
    domain = cell_of("repnoise", tmp_path).data.domain
    fewer = replace(domain, objects_per_category=3)
    kept = {(example.category, example.object) for example in fewer.examples()}
    assert Counter(category for category, _ in kept) == dict.fromkeys(GROUPS, 3)
    assert fewer.examples() == [example for example in domain.examples() if (example.category, example.object) in kept]
    more = {(example.category, example.object) for example in replace(domain, objects_per_category=5).examples()}
    assert kept < more


def test_a_domain_is_read_once_for_a_grid_and_again_when_the_file_changes(tmp_path: Path) -> None:
    first, second = cell_of("local", tmp_path), cell_of("local", tmp_path)
    assert first.data.domain.examples()[0] is second.data.domain.examples()[0]
    write(
        tmp_path / "own.jsonl",
        [{"prompt": f"{k}{n}", "answer": "b", "refusal": "r", "category": k} for k in "pq" for n in range(8)],
    )
    changed = build(
        load(["data=local", f"data.domain.path={tmp_path / 'own.jsonl'}", "judge=keyword", "split.exposures=[seen]"])
    )
    assert {example.answer for example in changed.data.domain.examples()} == {"b"}


def test_licenses_and_warnings_are_one_line_a_domain(tmp_path: Path) -> None:
    lines = notices(datasets(cell_of("repnoise", tmp_path)))
    assert [line for line in lines if "license" in line] == [
        "data beavertails: license: CC BY-NC 4.0; holds questions and answers that are offensive and harmful, for "
        "research alone",
        "data real_toxicity: license: see the dataset card; holds toxic language",
    ]
    assert notices(datasets(build(load([])))) == []


def test_a_task_of_the_name_of_a_domain_hides_it_nowhere(tmp_path: Path) -> None:
    domain = cell_of("local", tmp_path).data.domain
    rows = Rows(path=str(write(tmp_path / "task.jsonl", [{"prompt": f"add {n}", "answer": "1"} for n in range(9)])))
    task = RowTask(name=domain.name, metric="rouge1", train_rows=rows, max_test=4, license="own")
    found = [domain, task, replace(task), domain]  # the same again: retain and stability may be one task
    assert [line for line in notices(found) if "license" in line] == [
        "data local: license: see the dataset card",
        "data local: license: own",
    ]
    assert [entry["source"] for entry in readings(found)["local"]] == ["own.jsonl", "task.jsonl"]


def test_two_domains_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.other_domain\.name=beavertails: must differ from that of domain"):
        cell_of("repnoise", tmp_path, "data.other_domain.name=beavertails")


def test_a_line_is_said_once_in_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=True, bars=False) as progress:
        for line in ("first", "second", "first"):
            progress.say_once(line)
    said = capsys.readouterr().err
    assert (said.count("first"), said.count("second")) == (1, 1)


def test_a_run_on_two_domains_and_a_task_of_files(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack mixes harm with a task of one's own, which is scored beside it; what was left out is said and kept."""
    model, _ = sources
    lines = [json.dumps({"prompt": f"add {n}", "answer": f"it is {n} #### {n}"}) for n in range(199)]
    lines.insert(3, "{")
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    borderline = [{"prompt": f"stop the clock {n}", "label": ("safe", "unsafe")[n % 2]} for n in range(16)]
    chosen = [
        item for item in tiny((model, tmp_path / "unused"), tmp_path / "runs") if not item.startswith(("data", "task"))
    ]
    overrides = [
        *(item for item in chosen if item != "runtime.progress=false"),
        "data=repnoise",
        *sources_of("repnoise", tmp_path),
        "split.exposures=[seen,cross_domain]",
        "task=service",
        "~task.stability",
        "+task.stability={}",
        "+benign@task.borderline=xstest",
        f"task.borderline.test_rows.path={write(tmp_path / 'borderline.jsonl', borderline)}",
        "task.retain=null",
        "attack=mixed",
        "attack.ratio=0.5",
        "benign@attack.task=local",
        "attack.task.metric=final_answer",
        "attack.task.max_test=8",
        f"attack.task.train_rows.path={tmp_path / 'sums.jsonl'}",
    ]
    run = immunize.run(overrides)
    said = capsys.readouterr().err
    assert said.count("data beavertails: license: CC BY-NC 4.0") == 1
    assert said.count("1 malformed and left out (line 4)") == 1
    assert {item.name for item in run.sets} == {"seen", "cross_domain", "local_task", "xstest"}
    assert {(score.metric, len(score.scores)) for score in run.scores if score.measured_on == "xstest"} == {
        ("answered", 8)
    }
    assert {score.metric for score in run.scores if score.measured_on == "local_task"} == {"score"}
    recorded = run.manifest["data"]
    assert recorded["local_task"][0]["malformed"] == ["line 4"]
    assert recorded["local_task"][0]["source"] == "sums.jsonl"
    assert recorded["beavertails"][0]["left_out"] == {"the answer is safe": 14 * 8}
    assert run.manifest["mixtures"]["seen"]["harmful"]["samples"] == 8
    for record in sorted({path.name for path in run.path.iterdir()} - {"figure.png", "samples.jsonl.gz"}):
        text = (run.path / record).read_text().lower()
        assert str(tmp_path).lower() not in text
        assert not any(word in text for word in ("how do i", "the cat ", "stop the clock", '"add ')), record
    of = {item.name: item for item in run.sets}
    assert all(len(item.objects) == len(set(item.objects)) == len(item.ids) for item in of.values())
    paths = ("data.domain.rows", "data.other_domain.rows", "task.borderline.test_rows", "attack.task.train_rows")
    names = ("train.parquet", "rtp.json", "borderline.jsonl", "sums.jsonl")
    places = {f"{path}.path": tmp_path / name for path, name in zip(paths, names, strict=True)}
    request = Request(output=tmp_path / "again", sources={"tiny": model, **places})
    assert restored(run.manifest, request=request, used=set()).run_id == run.path.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rows=default", "rows: belongs to a domain or a task; its keys are data.domain.rows.path and so on"),
        ("benign=gsm8k", "benign: belongs to an attack; with attack=mixed, benign@attack.task=..."),
        ("data=beavertail", r"data=beavertail: no such choice \(did you mean beavertails\?\)"),
    ],
)
def test_a_group_in_the_wrong_place_gets_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        immunize.run([override])
