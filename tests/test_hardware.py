"""What needs a library or a GPU is refused in one clear line where it is missing, before anything is trained."""

import importlib.machinery
from typing import Any

import pytest
import torch

from immunize import validation
from immunize.config import Cell, build, load
from immunize.validation import check_hardware

EIGHT_BIT, FOUR_BIT = "optimizer@attack.optimizer=adamw_8bit", "trainable@attack.trainable=qlora"


def cell(*overrides: str) -> Cell:
    return build(load(overrides))


def found(name: str) -> Any:
    return importlib.machinery.ModuleSpec(name, None)


@pytest.mark.parametrize("override", [EIGHT_BIT, FOUR_BIT, EIGHT_BIT.replace("attack", "defense.repnoise.tuning")])
def test_a_missing_library_and_a_missing_gpu_are_named(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cell(override)
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed; pip install 'immunize\["):
            check_hardware(asked, device)
    monkeypatch.setattr(validation, "find_spec", found)
    with pytest.raises(ValueError, match="needs a GPU, and this run is on the processor"):
        check_hardware(asked, "cpu")
    check_hardware(asked, "cuda")


def test_the_default_run_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    check_hardware(cell(), "cpu")


def test_more_devices_than_there_are_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cell("runtime=ddp", "runtime.devices=2")
    for there, message in ((0, "sees 0 GPUs here"), (1, "sees 1 GPU here")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        with pytest.raises(ValueError, match=f"^runtime.devices=2: torch {message}$"):
            check_hardware(asked, "cuda")
        check_hardware(asked, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_hardware(asked, "cuda")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["trainable@defense.repnoise.tuning.trainable=qlora"], "defense.repnoise.tuning.trainable.quantized: only an"),
        ([FOUR_BIT, "attack.keep_weights=true"], "attack.keep_weights=true: weights of 4 bits are not kept"),
        ([FOUR_BIT, "attack.trainable.adapter=continued"], "quantized=nf4: an adapter cannot be taken out"),
        (
            [FOUR_BIT, "threat=finetuning_service", "defense=antidote"],
            "defense.antidote: cannot edit weights of 4 bits",
        ),
        (["runtime.strategy=fsdp"], "strategy=fsdp: is not supported yet"),
        (["runtime=ddp"], "runtime.devices=1: strategy=ddp shares a tuning among several; give"),
        (["runtime.devices=2"], "devices=2: strategy=single has one; choose runtime=ddp"),
        (
            ["runtime=ddp", "runtime.devices=3"],
            "runtime.devices=3: attack: batch_size=16, micro_batch=None: 3 processes",
        ),
        (
            ["runtime=ddp", "runtime.devices=2", "+defense.repnoise.tuning.micro_batch=16"],
            "runtime.devices=2: defense.repnoise.tuning: batch_size=16, micro_batch=16: 2 processes must have equally",
        ),
        (
            ["runtime=ddp", "runtime.devices=2", "task=data_to_text", "task.trainability.data_to_text.batch_size=5"],
            "runtime.devices=2: task.trainability.data_to_text: batch_size=5, micro_batch=None: 2 processes must",
        ),
        (
            [
                "runtime=ddp",
                "runtime.devices=2",
                "threat=finetuning_service",
                "defense=resta",
                "defense.resta.unsafe_tuning.batch_size=5",
            ],
            "runtime.devices=2: defense.resta.unsafe_tuning: batch_size=5, micro_batch=None: 2 processes must",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_when_it_is_built(overrides: list[str], part: str) -> None:
    with pytest.raises(ValueError) as caught:
        cell(*overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)
