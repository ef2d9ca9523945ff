"""Archives and manifests that somebody made to do harm: each is refused by name, and nothing of it is run or written.

Their contents are harmless.
"""

import gzip
import io
import json
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from immunize.sharing.archive import _header, land, write
from immunize.sharing.configuration import allowed_targets, refuse_unsafe
from immunize.sharing.members import Limits
from immunize.sharing.pack import pack
from immunize.sharing.source import opened
from tests.shared import change_manifest, members, raw_archive, rewritten, share
from tests.synthetic import write_study

RUN = "grid/0123456789"
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("malicious")
    study = write_study(root / "multirun", "grid", defenses=("repnoise",), rates=(1e-3,), seeds=(0,))
    return pack(study, output=root / "grid.tar.gz").path


@pytest.fixture
def folder(archive: Path, tmp_path: Path) -> Path:
    """The only run, unpacked; its study is the folder above."""
    for name, content in members(archive).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "grid" / "immunize-archive.json").unlink()
    (run,) = [path.parent for path in (tmp_path / "in" / "grid").glob("*/DONE")]
    return run


def member(
    name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"{}"
) -> list[tuple[tarfile.TarInfo, bytes]]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    return [(info, content)]


MEMBERS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "an absolute path": (member("/tmp/x"), "/tmp/x: refused: an absolute path"),
    "a drive": (member("C:/x"), "an absolute path"),
    "a way out": (member("grid/../../x"), "leads out of the archive"),
    "a way out of a run": (member(f"{RUN}/../../../x"), "leads out of the archive"),
    "a backslash": (member("grid\\..\\x"), "a backslash"),
    "a symbolic link": (member(f"{RUN}/DONE", kind=tarfile.SYMTYPE, link="/etc/passwd"), "DONE: a symbolic link"),
    "a hard link": (member(f"{RUN}/DONE", kind=tarfile.LNKTYPE, link="/etc/passwd"), "DONE: a hard link"),
    "a device": (member(f"{RUN}/DONE", kind=tarfile.CHRTYPE), "DONE: a device"),
    "a block device": (member(f"{RUN}/DONE", kind=tarfile.BLKTYPE), "DONE: a device"),
    "a pipe": (member(f"{RUN}/DONE", kind=tarfile.FIFOTYPE), "DONE: a pipe"),
    "a folder": (member("grid/report", kind=tarfile.DIRTYPE), "a folder"),
    "a sparse file": (member(f"{RUN}/DONE", kind=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "an unknown kind": (member(f"{RUN}/DONE", kind=b"Z"), "a special member"),
    "a long name": (member(f"grid/report/{'x' * 200}.csv"), "an extended header"),
    "a name twice": (member(f"{RUN}/DONE") * 2, "two members of this name"),
    "a clash by case": (member("grid/report/a.csv") + member("grid/report/A.csv"), "upper and lower case only"),
    "a clash by form": (member("grid/report/\u00e9.csv"), "plain ASCII only"),
    "a colored name": (member("grid/report/\x1b[31m.csv"), "plain ASCII only"),
    "two studies": (member(f"{RUN}/DONE") + member("other/report/a.csv"), "an archive holds one study"),
    "no study": (member("DONE"), "below the study's folder"),
    "a study that is no name": (member("-rf/report/a.csv"), "below the study's folder"),
    "a hidden file": (member(f"{RUN}/.bashrc"), "a hidden file"),
    "a hidden study": (member(".ssh/report/a.csv"), "a hidden file"),
    "a run that is none": (member("grid/first/manifest.json"), "ten hexadecimal digits"),
    "a run in capitals": (member("grid/0123456789AB/DONE"), "ten hexadecimal digits"),
    "pickled weights": (member("grid/stages/prepare/0123456789abcdef/weights/x.bin"), "safetensors"),
    "a checkpoint": (member(f"{RUN}/x.PT"), "run code when they are loaded"),
    "a program": (member("grid/report/x.py"), "packs no such file"),
    "W&B's folder": (member(f"{RUN}/wandb/x.json"), "packs no such file"),
    "a file as a folder": (member("grid/report/a.csv") + member("grid/report/a.csv/b.csv"), "cannot be read"),
    "no index": (member(f"{RUN}/manifest.json"), "has no immunize-archive.json"),
    "no run": (member("grid/immunize-archive.json"), "holds no run"),
    "nothing": ([], "holds nothing"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_malicious_member_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infos, expected = MEMBERS[kind]
    path = raw_archive(tmp_path / "a.tar.gz", infos)
    assert share("verify", path) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.rstrip("\n").isprintable()
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar.gz"]


def test_extended_headers_cannot_rename_or_resize(tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{RUN}/DONE")
    info.pax_headers = {"path": "../../x", "size": "9999999999"}
    path = raw_archive(tmp_path / "a.tar.gz", [(info, b"")], form=tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match="an extended header"), opened(path):
        pass


INDEXES: dict[str, tuple[str, str]] = {
    "another format": ('{"format": 2, "study": "grid", "members": {}}', "reads format 1"),
    "a study with a path": ('{"format": 1, "study": "../grid", "members": {}}', "letters, digits"),
    "another study": ('{"format": 1, "study": "other", "members": {}}', "speaks of study other"),
    "a list": ("[]", "cannot be read"),
    "a list of members": ('{"format": 1, "study": "grid", "members": []}', "must map names"),
    "an empty index": ('{"format": 1, "study": "grid", "members": {}}', "it is not in the index"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_malicious_index_is_refused(
    kind: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = INDEXES[kind]

    def change(found: dict[str, bytes]) -> None:
        found["grid/immunize-archive.json"] = text.encode()

    assert share("verify", rewritten(archive, tmp_path / "a.tar.gz", change, index=False)) == 2
    assert expected in capsys.readouterr().err


def test_a_member_beside_the_index_is_refused(archive: Path, tmp_path: Path) -> None:
    def change(found: dict[str, bytes]) -> None:
        found["grid/report/added.html"] = b""

    with (
        pytest.raises(ValueError, match=r"report/added\.html: refused: it is not in the index"),
        opened(rewritten(archive, tmp_path / "a.tar.gz", change, index=False)),
    ):
        pass


def bomb(path: Path, name: str, *, size: int, content: int) -> Path:
    """A header that speaks of `size` bytes, and `content` zeros that hardly take any room."""
    info = tarfile.TarInfo(name)
    info.size = size
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.write(b"\0" * content)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(
    ("name", "size", "content", "limits", "expected"),
    [
        (f"{RUN}/scores.jsonl", 10**15, 0, Limits(), "refused: 1000000000000000 bytes"),
        (f"{RUN}/manifest.json", 17 * 2**20, 0, Limits(), "refused: .* bytes"),
        (f"{RUN}/scores.jsonl", -1, 0, Limits(), "refused: -1 bytes"),
        (f"{RUN}/scores.jsonl", 2000, 100, Limits(), "cut off"),
        (f"{RUN}/scores.jsonl", 2000, 2560, Limits(records=1000), "larger than 1000 bytes together"),
        ("grid/stages/prepare/0123456789abcdef/weights/x.safetensors", 2**22, 2**22, Limits(records=0), "many times"),
        (f"{RUN}/scores.jsonl", 0, 2**22, Limits(records=0), "many times"),
    ],
)
def test_what_is_too_large_is_refused_while_it_is_read(
    name: str, size: int, content: int, limits: Limits, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=expected):
        land(bomb(tmp_path / "a.tar.gz", name, size=size, content=content), tmp_path / "in", limits=limits)


def test_a_real_bomb_stops_at_the_first_member_that_is_too_large(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.tar.gz", f"{RUN}/scores.jsonl", size=65 * 2**20, content=65 * 2**20)
    assert path.stat().st_size < 10**5
    assert share("verify", path) == 2


def test_a_file_of_more_than_eight_gigabytes_has_a_header_too() -> None:
    header = _header("grid/stages/prepare/0123456789abcdef/weights/x.safetensors", 9 * 2**30)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 * 2**30
    with pytest.raises(ValueError, match="too long a name"):
        _header("x" * 300, 1)


def test_too_many_members_and_a_second_archive_behind_the_first_are_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "many.tar.gz", {f"grid/report/{number}.csv": b"" for number in range(4)})
    with pytest.raises(ValueError, match="more than 3 members"):
        land(tmp_path / "many.tar.gz", tmp_path / "in", limits=Limits(members=3))
    (tmp_path / "two.tar.gz").write_bytes(archive.read_bytes() * 2)
    with pytest.raises(ValueError, match="something follows the end"), opened(tmp_path / "two.tar.gz"):
        pass


def test_links_in_a_folder_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_text("{}")
    (folder / "curve.jsonl").unlink()
    (folder / "curve.jsonl").symlink_to(tmp_path / "other")
    assert share("verify", folder.parent) == 2
    assert "curve.jsonl: a symbolic link" in capsys.readouterr().err
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert share("replay", folder.parent, "--output", tmp_path / "out") == 2
    assert "a symbolic link" in capsys.readouterr().err


def put(*place: str, value: Any) -> Callable[[Manifest], None]:
    """A change of the configuration at a place, which is made where it is not."""

    def change(manifest: Manifest) -> None:
        node = manifest["config"]
        for name in place[:-1]:
            node = node.setdefault(name, {})
        node[place[-1]] = value

    return change


EVIL = {"_target_": "evil_configuration.Evil"}
MANIFESTS: dict[str, tuple[Callable[[Manifest], None], str]] = {
    "a foreign class": (put("attack", value=EVIL), r"attack\._target_=evil_configuration\.Evil: refused"),
    "a class in a list": (put("split", "exposures", value=[["seen", EVIL]]), r"split\.exposures\[0\]\[1\]\._target_"),
    "a class in a deep mapping": (put("task", "a", "b", "c", value=EVIL), r"task\.a\.b\.c\._target_"),
    "a class under a key of no one": (put("comment", value={"x": EVIL}), r"comment\.x\._target_"),
    "a class in the tracking": (put("tracking", value=EVIL), r"tracking\._target_"),
    "a class in the runtime": (put("runtime", "more", value=EVIL), r"runtime\.more\._target_"),
    "a class at the root": (put("_target_", value="evil_configuration.Evil"), r"_target_=evil"),
    "a function": (put("model", "_target_", value="os.system"), r"model\._target_=os\.system: refused"),
    "no name of a class": (put("model", "_target_", value=["os", "system"]), "refused"),
    "a class by another's prefix": (put("model", "_target_", value="immunize.models.sources.HubModel.x"), "refused"),
    "a class that resembles": (put("model", "_target_", value="immunize_evil.models.X"), "refused"),
    "a store of stages": (put("attack", "_target_", value="immunize.stages.StageStore"), "refused"),
    "the pipeline": (put("attack", "_target_", value="immunize.pipeline.Pipeline"), "refused"),
    "an upload as a judge": (put("judge", "x", value={"_target_": "immunize.tracking.Wandb"}), "refused"),
    "our own machinery": (put("data", "_target_", value="immunize.sharing.source.Shared"), "refused"),
    "an unlisted helper": (put("judge", "x", value={"_target_": "immunize.records.Run"}), "refused"),
    "another builder's key": (put("attack", "_partial_", value=True), r"attack\._partial_: refused"),
    "arguments": (put("attack", "_args_", value=["x"]), r"attack\._args_: refused"),
    "the environment": (put("data", "domain", "name", value="${oc.env:HOME}"), r"domain\.name=.*would be resolved"),
    "a reference": (put("budget", "samples", value="${seed}"), "would be resolved"),
    "an escaped reference": (put("budget", "x", value="\\${oc.env:HOME}"), "would be resolved"),
    "a reference as a key": (put("task", "${oc.env:HOME}", value=1), "a key holds letters"),
    "a reference in the study": (put("study", value="${oc.env:HOME}"), "would be resolved"),
    "a path as study": (put("study", value="../../x"), "looks like a path"),
    "an inner path as study": (put("study", value="a/b"), "becomes a folder's name"),
    "a colored key": (put("task", "\x1b[31m", value=1), "a key holds letters"),
    "a colored value": (put("control", value="\x1b[31mnone"), "control characters"),
    "markup as a key": (put("defense", "[link=x]", value={}), "a key holds letters"),
    "a local path": (
        put("model", value={"_target_": "immunize.models.sources.LocalModel", "path": "../../etc"}),
        "a manifest holds names only",
    ),
    "an absolute path": (put("model", "id", value="/etc"), "looks like a path"),
    "a path from home": (put("model", "id", value="~/x"), "looks like a path"),
    "a path in a list": (put("task", "files", value=["x/../../y"]), "looks like a path"),
    "a local source": (
        put("model", value={"_target_": "immunize.models.sources.LocalModel", "path": "tiny"}),
        r"model\.path: a local source; say where it lies with --source tiny=PATH",
    ),
    "endless threads": (put("runtime", "threads", value=10**9), r"runtime\.threads"),
    "endless resampling": (put("conditions", "resamples", value=10**9), r"conditions\.resamples"),
    "another meaning": (put("budget", "learning_rate", value=0.5), r"budget\.learning_rate \(0.001 there, 0.5 here\)"),
    "nonsense": (put("judge", "exact", value={"_target_": "immunize.training.tuning.Optimizer"}), "cannot be built"),
    "a wrong type": (put("seed", value="0"), r"config\.seed: must be a whole number"),
    "a schema of its own": (lambda manifest: manifest.pop("identity"), "manifest.json: lacks identity"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_malicious_manifest_is_not_replayed(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    (tmp_path / "evil_configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", "/secret/place")
    change, expected = MANIFESTS[kind]
    change_manifest(folder, change)
    assert share("replay", folder.parent, "--output", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert re.search(expected, printed), printed
    assert printed.rstrip("\n").isprintable()
    assert "/secret/place" not in printed
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()
    assert "evil_configuration" not in sys.modules


def test_allowed_are_the_shipped_choices_and_nothing_that_acts() -> None:
    found = allowed_targets()
    assert {"immunize.models.sources.HubModel", "immunize.defenses.repnoise.RepNoise"} <= found
    acting = ("stages", "records", "pipeline", "runner", "cli", "sharing", "report", "manifest", "worker")
    assert not [target for target in found if target.split(".")[1] in acting]


def test_trust_is_for_one_package_and_not_for_others_that_begin_alike(folder: Path) -> None:
    config = json.loads((folder / "manifest.json").read_text())["config"]
    config["attack"] = {"_target_": "own.Attack"}
    refuse_unsafe(config, trusted=["own"])
    config["attack"] = {"_target_": "owned.Attack"}
    with pytest.raises(ValueError, match=r"owned\.Attack: refused"):
        refuse_unsafe(config, trusted=["own"])


def test_our_own_package_cannot_be_trusted_as_a_whole(folder: Path) -> None:
    config = json.loads((folder / "manifest.json").read_text())["config"]
    for package in ("immunize", "immunize.stages"):
        with pytest.raises(ValueError, match="--trust immunize: refused"):
            refuse_unsafe(config, trusted=[package])


def test_random_damage_is_refused_or_found_and_never_crashes(archive: Path, tmp_path: Path) -> None:
    whole = bytearray(gzip.decompress(archive.read_bytes()))
    headers = [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(3):
            changed[generator.choice(headers) + generator.randrange(512)] = generator.randrange(256)
        for place in headers:  # so that a header is refused for what it says
            total = sum(changed[place : place + 148]) + 8 * 32 + sum(changed[place + 156 : place + 512])
            changed[place + 148 : place + 156] = b"%06o\0 " % total
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(changed), 1))
        try:
            with opened(tmp_path / "a.tar.gz") as shared:
                assert shared.study == "grid"
        except ValueError:
            refused += 1
    assert refused > 10
