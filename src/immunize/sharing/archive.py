"""Writing an archive with equal bytes for equal content, and reading one that somebody else made.

The reader knows regular files with plain names and nothing else: no links, devices, folders, extended headers or
sparse files, so that no header can redirect, rename or resize another. It never uses tarfile's extraction.
"""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from immunize.sharing.inert import plain
from immunize.sharing.members import Limits, fault, is_weights

BLOCK = 512
CHUNK = 2**20
LARGEST_OCTAL = 8**11 - 1
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
    tarfile.GNUTYPE_LONGNAME: "an extended header",
    tarfile.GNUTYPE_LONGLINK: "an extended header",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def write(path: Path, members: Mapping[str, Path | bytes]) -> None:
    """Write a .tar.gz of `members`, by name: sorted, without times, owners and modes of the machine."""
    temporary = path.with_name(f".{path.name}.making")
    try:
        with temporary.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
            for name in sorted(members):
                source = members[name]
                size = len(source) if isinstance(source, bytes) else source.stat().st_size
                stream.write(_header(name, size))
                written = sum(stream.write(chunk) for chunk in _chunks(source))
                if written != size:
                    raise ValueError(f"{name}: changed while it was packed; pack again when nothing writes to it")
                stream.write(b"\0" * (-size % BLOCK))
            stream.write(b"\0" * 2 * BLOCK)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        header = info.tobuf(tarfile.GNU_FORMAT if size > LARGEST_OCTAL else tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise ValueError(f"{name}: too long a name for an archive; give the study a shorter one") from error
    if len(header) != BLOCK:
        raise ValueError(f"{name}: too long a name for an archive; give the study a shorter one")
    return header


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            yield chunk


def land(archive: Path, folder: Path, *, limits: Limits) -> tuple[str, dict[str, str]]:
    """Read an archive into the empty `folder`, all but the weights; the study's name and each member's SHA-256.

    Raises ValueError at the first member that is anything but a file that `immunize-share pack` could have written.
    """
    try:
        with gzip.open(archive, "rb") as stream:
            landing = _Landing(stream, folder, limits=limits, compressed=archive.stat().st_size)
            while landing.member():
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{plain(archive)}: cannot be read as an archive ({plain(error)})") from error
    if landing.study is None:
        raise ValueError(f"{plain(archive)}: holds nothing; immunize-share pack makes an archive")
    return landing.study, landing.digests


class _Landing:
    def __init__(self, stream: BinaryIO | gzip.GzipFile, folder: Path, *, limits: Limits, compressed: int) -> None:
        self.stream, self.folder, self.limits = stream, folder, limits
        self.left = limits.records + limits.expansion * compressed  # bytes that may still come out
        self.left_on_disk = limits.records
        self.study: str | None = None
        self.digests: dict[str, str] = {}
        self._folded: set[str] = set()

    def member(self) -> bool:
        """Read one member; False at the end."""
        header = self._exactly(BLOCK)
        if not header.strip(b"\0"):
            self._end()
            return False
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"not an archive of immunize-share: {error}") from error
        shown = plain(info.name, longest=120) or "a member without a printable name"
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"{shown}: {KINDS.get(info.type, 'a special member')}; an archive holds plain files only")
        wrong = fault(info.name)
        if wrong is not None:
            raise ValueError(f"{shown}: refused: {wrong}")
        study, _, name = info.name.partition("/")
        if self.study not in (None, study):
            raise ValueError(f"{shown}: refused: an archive holds one study, and this one began with {self.study}")
        if name in self.digests:
            raise ValueError(f"{shown}: refused: there are two members of this name")
        if name.casefold() in self._folded:
            raise ValueError(f"{shown}: refused: another member's name differs in upper and lower case only")
        if len(self.digests) >= self.limits.members:
            raise ValueError(f"{shown}: refused: more than {self.limits.members} members")
        largest = self.limits.largest(name)
        if not 0 <= info.size <= largest:
            raise ValueError(f"{shown}: refused: {info.size} bytes, and at most {largest} are read")
        self.study = study
        self._folded.add(name.casefold())
        self.digests[name] = self._content(name, info.size)
        self._exactly(-info.size % BLOCK)
        return True

    def _content(self, name: str, size: int) -> str:
        digest = hashlib.sha256()
        if is_weights(name):
            for chunk in self._read(size):
                digest.update(chunk)
            return digest.hexdigest()
        self.left_on_disk -= size
        if self.left_on_disk < 0:
            raise ValueError(f"{name}: refused: the records are larger than {self.limits.records} bytes together")
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as handle:
            for chunk in self._read(size):
                digest.update(chunk)
                handle.write(chunk)
        return digest.hexdigest()

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            chunk = self.stream.read(min(size, CHUNK))
            if not chunk:
                raise ValueError("the archive is cut off; ask for it again")
            self._count(len(chunk))
            size -= len(chunk)
            yield chunk

    def _exactly(self, size: int) -> bytes:
        return b"".join(self._read(size))

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError("refused: it expands to many times its size, as records and weights never do")

    def _end(self) -> None:
        """Reading on to the very end also checks the compression's own checksum."""
        while chunk := self.stream.read(CHUNK):
            self._count(len(chunk))
            if chunk.strip(b"\0"):
                raise ValueError("refused: something follows the end of the archive")
