"""immunize-share pack|verify|replay: give a study to somebody else, and check or repeat one that was given."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from immunize.cli.errors import reported
from immunize.records import RunFailedError
from immunize.sharing.inert import plain

SAMPLES = "also the private samples: text that models wrote, harmful text among it"


def main() -> None:
    """The console command; 0 if all is well, 1 if something differs, 2 for what cannot be used."""
    arguments = _parser().parse_args()
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"pack": _pack, "verify": _verify, "replay": _replay}
    codes: list[int] = []

    def command() -> None:
        try:
            codes.append(commands[arguments.command](arguments))
        except (ValueError, RunFailedError) as error:
            raise type(error)(plain(error)) from error
        except OSError as error:
            raise ValueError(plain(f"{error.filename or arguments.path}: {error.strerror or error}")) from error

    code = reported(command)
    sys.exit(code or codes[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="immunize-share", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write one archive of a study's records")
    pack.add_argument("path", metavar="STUDY", type=Path, help="such as multirun/first_grid")
    pack.add_argument("--output", type=Path, help="the archive (default: STUDY.tar.gz in this folder)")
    pack.add_argument("--weights", action="store_true", help="also the defended weights")
    pack.add_argument("--samples", action="store_true", help=SAMPLES)
    verify = commands.add_parser("verify", help="compute checks and verdicts anew from the scores, and compare")
    replay = commands.add_parser("replay", help="run everything again from the manifests alone, and compare")
    for sub in (verify, replay):
        sub.add_argument("path", metavar="ARCHIVE_OR_FOLDER", type=Path)
    replay.add_argument("--run", action="append", default=[], metavar="ID", help="only this run; may be repeated")
    replay.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="where a local source lies")
    replay.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="allow this package's classes")
    replay.add_argument("--output", type=Path, help="where to run (default: ./replay-STUDY)")
    return parser


def _pack(arguments: argparse.Namespace) -> int:
    from immunize.sharing.pack import pack

    packed = pack(arguments.path, output=arguments.output, weights=arguments.weights, samples=arguments.samples)
    _print([f"left out: {line}" for line in packed.left_out])
    print(f"{packed.path}: {packed.runs} runs, {packed.members} files, {packed.size / 1e6:.2f} MB")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from immunize.sharing.source import opened
    from immunize.sharing.verify import verify

    with opened(arguments.path) as shared:
        found = verify(shared)
    for place, differences in found.differences.items():
        _print([f"{place}: {line}" for line in differences])
    _print([f"note: {line}" for line in found.notes])
    differing = sum(place.startswith("run ") for place in found.differences)
    print(f"{shared.study}: {len(found.runs)} runs, {found.computed} computed anew, {differing} with differences")
    if found.is_well:
        print("Every hash, id, check and verdict follows from the scores.")
    else:
        print("Not everything follows from the scores. Another version of immunize may compute checks differently.")
    return 0 if found.is_well else 1


def _replay(arguments: argparse.Namespace) -> int:
    from immunize.sharing.replay import Request, replay
    from immunize.sharing.source import opened

    with opened(arguments.path) as shared:
        output = arguments.output or Path(f"replay-{shared.study}")
        sources = dict(_source(item) for item in arguments.source)
        request = Request(output=output, runs=arguments.run, sources=sources, trusted=arguments.trust)
        passed = []
        for run in replay(shared, request, say=lambda line: _print([line])):
            asked = "equal bytes" if run.asked == "bytes" else "overlap of intervals"
            because = f", since the environment differs ({'; '.join(run.environment)})" if run.environment else ""
            outcome = {True: "passed", False: "NOT passed", None: "nothing to compare"}[run.passed]
            _print([f"  asked: {asked}{because}", *(f"  {line}" for line in run.lines), f"  {outcome}"])
            passed.append(run.passed)
    print(f"{shared.study}: {passed.count(True)} of {len(passed)} replayed runs passed; records in {output}/")
    return 1 if False in passed else 0


def _source(item: str) -> tuple[str, Path]:
    name, separator, path = item.partition("=")
    if not (name and separator and path):
        raise ValueError(f"--source {item}: must be NAME=PATH")
    return name, Path(path)


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(plain(line, longest=2000))


if __name__ == "__main__":
    main()
