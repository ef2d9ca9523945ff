"""immunize-judge study=NAME judge=CHOICE: the saved answers of a study under another judge; nothing is trained."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from immunize.cli.errors import reported
from immunize.cli.report import folder_of, parsed

if TYPE_CHECKING:
    from immunize.rejudge import Judgement

HELP = """immunize-judge: the saved answers of a study under another judge; nothing is trained or generated.

  immunize-judge study=NAME judge=keyword                          another judge of the shipped ones
  immunize-judge FOLDER judge=guard judge.guard.model.path=DIR judge.guard.model.commit=null
  immunize-judge study=NAME judge=endpoint judge.endpoint.base_url=URL judge.endpoint.model=MODEL

Writes FOLDER/judgements/JUDGE-ID.jsonl and changes no run. What the judge failed on is asked again the next time."""
OWN = ("runtime.device", "runtime.threads")


def main() -> None:
    """The console command; exit code 0 whatever the verdicts, 2 where there is nothing to judge or no way to."""
    sys.exit(reported(lambda: _command(sys.argv[1:])))


def _command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "immunize-judge", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH", help="where a local source of the study lies"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="build a domain of your own package"
    )
    given = parser.parse_args(arguments)
    chosen = [item for item in given.keys if item.startswith(("judge=", "judge."))]
    own = {key: item.partition("=")[2] for item in given.keys for key in OWN if item.startswith(f"{key}=")}
    rest = [item for item in given.keys if item not in chosen and item.partition("=")[0] not in OWN]
    judge = _judge(chosen)
    folder = folder_of(*parsed(rest))

    import torch

    from immunize.rejudge import Sources, rejudge, save
    from immunize.runner import choose_device
    from immunize.study import read_study

    threads = own.get("runtime.threads", "2")
    if not threads.isdecimal() or threads == "0":
        raise ValueError(f"runtime.threads={threads}: must be a whole number, at least 1")
    torch.set_num_threads(int(threads))
    study = read_study(folder)
    sources = Sources(places=dict(map(_place, given.source)), trusted=given.trust)
    device = choose_device(own.get("runtime.device", "auto"))
    console = Console(stderr=True, highlight=False)
    judgement = rejudge(study, judge, sources=sources, device=device, say=console.print)
    path = save(judgement, study)
    print_judgement(judgement, console=Console(highlight=False))
    print(f"{path}: scores and checks, no text")


def _judge(overrides: list[str]) -> Any:
    """The one judge that is chosen; built like any configuration."""
    from omegaconf import OmegaConf

    from immunize.config import load
    from immunize.instantiate import instantiate

    if not any(item.startswith("judge=") for item in overrides):
        raise ValueError("judge: choose one, such as judge=keyword; immunize --help lists them")
    plain: Any = OmegaConf.to_container(load(overrides).judge, resolve=True)
    if len(plain) != 1:
        raise ValueError(f"judge: one at a time, and these are {', '.join(plain)}")
    ((key, node),) = plain.items()
    judge = instantiate(node, object, key=f"judge.{key}")
    check = getattr(judge, "check", None)
    if check is not None:
        check()
    return judge


def _place(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not sign or not name:
        raise ValueError(f"--source {text}: must be NAME=PATH")
    return name, Path(path).expanduser()


def print_judgement(judgement: "Judgement", *, console: Console) -> None:
    """Agreement with each judge that was there before, and the verdicts of both, side by side."""
    from immunize.rejudge import verdicts
    from immunize.report.numbers import WEAK

    for item in judgement.agreements:
        console.print(item.in_words(judgement.judge))
    if judgement.models:
        console.print(f"answered by {', '.join(judgement.models)}")
    counted = verdicts(judgement)
    runs = Counter[tuple[str, str]]()
    for (check, judge, _, _), count in counted.items():
        runs[check, judge] += count
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("check", "judge", "verdict", judgement.judge, "runs"):
        table.add_column(heading, justify="right" if heading == "runs" else "left")
    for (check, judge, old, new), count in sorted(counted.items()):
        table.add_row(check, judge, old, new, f"{count} of {runs[check, judge]}")
    console.print(table if counted else "No defense: scores only, and nothing to check.")
    for name in {judgement.judge, *(item.judge for item in judgement.agreements)} & WEAK.keys():
        console.print(f"{name}: {WEAK[name]}")
