"""Configuration: everything shipped builds, everything can be overridden, and a mistake gets one clear line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from immunize.config import Cell, build, choices, load
from immunize.instantiate import TARGET, instantiate

CONF = Path(__file__).parents[1] / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("__pycache__", "hydra"))
NAMED = {"llama2_7b_chat", "llama3_1_8b_instruct", "qwen2_5_1_5b_instruct", "smollm2_135m_instruct"}
NEEDS_A_VALUE = {"model": {"local", "hub", *NAMED}, "defense": {"checkpoint"}}
# Those of data sets are built from files in tests/test_data_sets.py, as they need a value or the network.
NEEDS_A_VALUE |= {"data": set(choices("data")) - {"miniature"}, "benign": set(choices("benign")), "rows": {"default"}}
NEEDS_A_VALUE |= {"runtime": {"ddp"}}
NEEDS_A_VALUE |= {"benchmark": set(choices("benchmark")) - {"none"}}  # built in tests/test_benchmarks.py
NEEDS_A_VALUE |= {"task": {"ag_news", "alpaca", "gem", "gsm8k", "local", "sst2", "xstest"}}
NEEDS_A_VALUE |= {
    "judge": {"beaver_dam", "classifier", "endpoint", "guard", "strong_reject", "strong_reject_finetuned", "zoo"}
}


def cell(*overrides: str) -> Cell:
    return build(load(overrides))


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        cell(*overrides)
    return str(caught.value)


def stage(defense: str) -> str | None:
    """Of a shipped choice; None of `none`."""
    for node in load([f"defense={defense}"]).defense.values():
        module, _, name = node[TARGET].rpartition(".")
        return str(getattr(__import__(module, fromlist=[name]), name).stage)
    return None


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_every_group_builds(group: str) -> None:
    for name in choices(group):
        if name in NEEDS_A_VALUE.get(group, ()):
            continue
        places = {"optimizer": "optimizer@attack.optimizer", "trainable": "trainable@attack.trainable"}
        without_retain = ["defense=none"] if (group, name) == ("task", "none") else []
        more = {"mixed": ["task=service"]}.get(name, without_retain) if group == "attack" else without_retain
        if group == "defense" and stage(name) in ("finetuning", "post"):
            assert f"acts at the {stage(name)} stage" in error_of(f"defense={name}")
            more = ["threat=finetuning_service"]
        assert cell(f"{places.get(group, group)}={name}", *more).run_id


def objects_in(plain: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(plain, Mapping):
        if TARGET in plain:
            yield key, plain
        for name, item in plain.items():
            yield from objects_in(item, f"{key}.{name}" if key else str(name))


def test_shipped_files_name_every_field_so_that_all_can_be_overridden() -> None:
    defenses, judges = (",".join(name for name in choices(group) if name != "none") for group in ("defense", "judge"))
    benchmarks = "benchmark=[harness,repnoise_table3,perplexity]"
    plain = OmegaConf.to_container(load([f"defense=[{defenses}]", f"judge=[{judges}]", benchmarks]))
    for key, node in objects_in(plain):
        module, _, name = node[TARGET].rpartition(".")
        cls = getattr(__import__(module, fromlist=[name]), name)
        given = set(node) - {TARGET}
        inherited = {"phrases", "template", "evaluation_share", "base", "optimizer", "trainable"}
        inherited |= {"enlarged", "direct_requests"}
        fields = {field.name for field in dataclasses.fields(cls) if field.init} - inherited
        missing = fields - given
        inside_a_base = key == "model.base"
        assert inside_a_base or not missing, f"{key}: {missing} cannot be overridden"


def test_overriding_reaches_the_objects() -> None:
    built = cell(
        "defense=adversarial_loss",
        "defense.adversarial_loss.weight=0.5",
        "budget.learning_rate=1e-4",
        "budget.samples=800",
        "split=same_samples",
        "seed=3",
    )
    assert built.defense["adversarial_loss"].weight == 0.5
    assert built.budget.learning_rate == 1e-4
    assert built.budget.steps == 50
    assert built.split.same_samples
    assert built.seed == 3


def test_defense_in_depth_keeps_its_order_and_none_is_empty() -> None:
    assert list(cell("defense=[safety_sft,repnoise]").defense) == ["safety_sft", "repnoise"]
    first, second = cell("defense=[safety_sft,repnoise]"), cell("defense=[repnoise,safety_sft]")
    assert first.run_id != second.run_id
    assert cell("defense=none").defense == {}


def test_an_experiment_beats_the_root_and_the_command_line_beats_both() -> None:
    assert cell("experiment=immunization_demo").budget.steps == 75
    assert cell("experiment=immunization_demo", "budget.samples=80").budget.steps == 20
    assert cell("experiment=immunization_demo").figure == "paper_figure_2"


def test_the_run_id_depends_on_what_is_studied_and_on_nothing_else() -> None:
    plain = cell().run_id
    unchanged = ("runtime.threads=1", "runtime.root=elsewhere", "tracking=none", "study=another", "figure=curves")
    changed = ("seed=1", "control=safety_sft", "budget.samples=32", "conditions.margin=0.2", "model.dtype=bfloat16")
    assert all(cell(override).run_id == plain for override in unchanged)
    assert len({cell(override).run_id for override in changed} | {plain}) == len(changed) + 1


def test_seed_zero_is_a_seed() -> None:
    assert cell("seed=0").seed == 0
    assert cell("seed=0").run_id != cell("seed=1").run_id


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("budget.learning_rate=-1", ("budget.learning_rate=-1", "must not be negative")),
        ("budget.samples=0", ("budget.samples=0", "at least 1")),
        ("budget.samples=ten", ("budget.samples=ten", "whole number")),
        ("budget.batch_size=5000", ("budget.batch_size=5000", "no step")),
        ("+defense.repnoise.betta=1", ("defense.repnoise.betta", "did you mean beta")),
        ("split.exposures=[]", ("split.exposures", "seen, in_domain, cross_domain")),
        ("split.exposures=[sen]", ("split.exposures[0]=sen", "did you mean seen")),
        ("split.exposures=seen", ("split.exposures=seen", "[seen]")),
        ("conditions.margin=2", ("conditions.margin=2", "between 0 and 1")),
        ("control=sft", ("control=sft", "none, safety_sft")),
        ("judge=[]", ("judge", "at least one")),
        ("study=a/b", ("study=a/b",)),
        ("study='a:b'", ("study=a:b",)),
        ("budget.learning_rate=nan", ("budget.learning_rate=nan", "a number")),
        ("figure=paper_figure_2", ("figure=paper_figure_2", "guard_every_step")),
        ("+judge.again={_target_: immunize.judges.exact.Exact}", ("judge", "exact, exact")),
        ("+nonsense=1", ("nonsense", "no such key")),
        ("model._target_=os.system", ("model._target_=os.system", "dataclass")),
        ("model._target_=nowhere.Model", ("model._target_=nowhere.Model", "cannot be imported")),
        ("data.other_domain=null", ("cross_domain", "data.other_domain")),
        ("data.defense_categories=[nothing]", ("data.defense_categories=['nothing']",)),
        ("data.defense_categories=[make,make]", ("data.defense_categories=['make', 'make']: names one twice",)),
        ("task.retain=null", ("task.retain", "benign")),
        ("attack.optimizer.momentum=0.5", ("attack.optimizer.momentum=0.5", "sgd")),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(override: str, parts: tuple[str, ...]) -> None:
    extra = ["defense=safety_sft"] if override == "task.retain=null" else []
    message = error_of(override, *extra)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_control_by_safety_sft_needs_a_defense_whose_steps_it_takes() -> None:
    assert "control=safety_sft" in error_of("control=safety_sft", "defense=none")


def test_a_missing_value_is_named() -> None:
    assert "model.path" in error_of("model=local")
    assert "model.commit" in error_of("model=hub", "model.id=some/model")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_named_model_wants_its_commit_and_says_where_it_stands(name: str) -> None:
    """No revision is shipped, and none is made up; with one, the run builds, and the unaligned base can be given."""
    message = error_of(f"model={name}")
    assert message.startswith("model.commit: ") and "???" not in message
    found = cell(f"model={name}", f"model.commit={'0a' * 20}").model
    assert f"huggingface.co/{found.id}/commits/main" in message
    assert (found.dtype, found.revision, found.base) == ("bfloat16", "0a" * 20, None)
    (line,) = re.findall("# its unaligned base: (.*)", (CONF / "model" / f"{name}.yaml").read_text())
    given = line.replace("...", "1b" * 20).split()
    based = cell(f"model={name}", f"model.commit={'0a' * 20}", *given, "defense=lox")
    assert based.model.base.id != found.id and based.defense["lox"].base == based.model.base
    assert based.model.base.dtype == "bfloat16"


def test_a_branch_is_no_pinned_revision() -> None:
    assert "40 hexadecimal digits" in error_of("model=hub", "model.id=some/model", "model.commit=main")


def test_model_folders_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = f"model.path={tmp_path}"
    assert "config.json" in error_of("model=local", path)
    (tmp_path / "config.json").write_text("{}")
    assert "safetensors" in error_of("model=local", path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "tokenizer" in error_of("model=local", path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "chat template" in error_of("model=local", path)


def test_only_trusted_packages_are_built_where_trust_is_limited() -> None:
    with pytest.raises(ValueError, match="only classes of immunize are trusted"):
        instantiate({TARGET: "decimal.Decimal"}, object, key="model", trusted=("immunize",))


def test_composing_and_failing_import_nothing_heavy() -> None:
    code = (
        "import sys; from immunize.config import load; load([]); import immunize.cli.run; "
        "print(sorted({'torch', 'transformers', 'pytorch_lightning', 'peft', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_building_a_run_imports_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys; from immunize.config import build, load; build(load([])); "
        "print(sorted({'transformers', 'pytorch_lightning', 'peft', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_a_continued_adapter_must_be_like_the_defenses() -> None:
    adapted = ("attack=lora", "attack.trainable.adapter=continued", "defense=repnoise")
    assert "trains no adapter" in error_of(*adapted)
    both = (*adapted, "trainable@defense.repnoise.tuning.trainable=lora")
    assert cell(*both).run_id
    assert "rank, alpha, dropout and targets" in error_of(*both, "attack.trainable.rank=8")


def test_keys_of_a_defense_that_is_not_chosen_are_named() -> None:
    assert "add defense=adversarial_loss" in error_of("experiment=immunization_demo", "defense=repnoise")


def test_a_judge_that_cannot_judge_the_domain_is_refused_before_any_training(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{letter}{number}", "answer": "yes", "refusal": "no", "category": letter}
        for letter in "ab"
        for number in range(8)
    ]
    (tmp_path / "harm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data=local", f"data.domain.path={tmp_path}/harm.jsonl", "split.exposures=[seen]")
    assert "judge.exact" in error_of(*own)
    assert cell(*own, "judge=keyword").run_id


def test_what_only_answers_need_does_not_retrain_a_defense() -> None:
    plain, longer = cell(), cell("model.max_new_tokens=30")
    assert plain.run_id != longer.run_id
    assert plain.model.weights_identity == longer.model.weights_identity


def test_from_python_a_mistyped_choice_is_a_value_error() -> None:
    import immunize

    with pytest.raises(ValueError, match=r"defense=repnois: no such choice \(did you mean repnoise\?\)"):
        immunize.run(["defense=repnois"])
