"""The command line as a person meets it: help, configuration, mistakes; each in a fresh process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from immunize.cli.run import main; main()"]
GROUPS = Path(__file__).parents[1] / "conf"


def immunize(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_every_group_and_its_choices(tmp_path: Path) -> None:
    text = immunize("--help", folder=tmp_path).stdout
    for group in GROUPS.iterdir():
        if group.is_dir() and group.name not in ("__pycache__", "hydra"):
            assert f"  {group.name} " in text
            assert f"\n{group.name}: " in text


def test_cfg_job_shows_the_composed_configuration_and_leaves_nothing(tmp_path: Path) -> None:
    done = immunize("--cfg", "job", "budget.samples=7", folder=tmp_path)
    assert done.returncode == 0
    assert "samples: 7" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("budget.learnin_rate=1",), ("budget.learnin_rate", "did you mean budget.learning_rate")),
        (("defense=repnois",), ("defense=repnois", "did you mean repnoise", "adversarial_loss")),
        (("defense=[repnoise,nope]",), ("defense=nope", "no such choice")),
        (("experimnt=x",), ("experimnt", "did you mean experiment")),
        (("seed=x",), ("seed=x", "Integer")),
        (("bad=[",), ("bad=[", "key=value")),
        (("budget.learning_rate=-1",), ("budget.learning_rate=-1", "must not be negative")),
        (("data=local", "data.domain.path=nowhere.json"), ("data.domain.path=nowhere.json", "no such file")),
        (("runtime.device=cuda", "runtime.progress=false"), ("runtime.device=cuda", "runtime.device=cpu")),
        (("runtime.root=/proc/nowhere",), ("/proc/nowhere", "runtime.root")),
    ],
)
def test_a_mistake_gets_one_line_and_no_traceback(
    arguments: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    done = immunize(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("immunize: ")
    assert all(part in line for part in parts), line


def test_the_traceback_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    done = immunize("budget.learning_rate=-1", folder=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_users_configuration_is_found_in_the_folder_and_by_the_variable(tmp_path: Path) -> None:
    text = "_target_: immunize.training.budget.Budget\nlearning_rate: 0.5\nsamples: 16\n"
    for folder in (tmp_path / "here" / "conf" / "budget", tmp_path / "there" / "budget"):
        folder.mkdir(parents=True)
        (folder / "own.yaml").write_text(text)
    arguments = ("--cfg", "job", "budget=own")
    assert "learning_rate: 0.5" in immunize(*arguments, folder=tmp_path / "here").stdout
    elsewhere = immunize(*arguments, folder=tmp_path, IMMUNIZE_CONF=str(tmp_path / "there"))
    assert "learning_rate: 0.5" in elsewhere.stdout
    missing = immunize(*arguments, folder=tmp_path, IMMUNIZE_CONF="nowhere")
    assert missing.returncode == 2
    assert "IMMUNIZE_CONF=nowhere" in missing.stderr


def test_a_sweep_builds_every_cell_before_it_runs_the_first(tmp_path: Path) -> None:
    done = immunize("-m", "budget.learning_rate=1e-4,-1,-2", "seed=0", folder=tmp_path)
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "budget.learning_rate=-1.0",
        "budget.learning_rate=-2.0",
    ]
    assert not list(tmp_path.glob("multirun/default*"))


SMALLER = (
    "budget.samples=16",
    "budget.measurements=1",
    "defense.repnoise.tuning.steps=3",
    "defense.repnoise.retain_weight=0",
    "task=none",
    "model.max_new_tokens=4",
    "model.base=null",
    "split.exposures=[seen]",
    "conditions.resamples=200",
    "runtime.threads=1",
    "runtime.progress=false",
)


def test_a_failed_cell_of_a_sweep_does_not_stop_the_others(tmp_path: Path) -> None:
    rates = "defense.repnoise.tuning.learning_rate=1e30,1e-4"
    done = immunize("-m", *SMALLER, "tracking=none", rates, folder=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "loss became" in done.stderr
    assert "within_budget" in done.stdout
    assert len(list(tmp_path.glob("multirun/default/*/DONE"))) == 1
    assert len(list(tmp_path.glob("multirun/default/*/ERROR.txt"))) == 1


def test_an_interrupt_says_that_nothing_finished_is_lost(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [*COMMAND, "budget.samples=16000", "tracking=none"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("multirun/.stages/attack/.*.making")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # into the tuning
    worker.send_signal(signal.SIGINT)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 130
    assert "goes on from the last finished stage" in errors.splitlines()[-1]
    assert "Traceback" not in errors
