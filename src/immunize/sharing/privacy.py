"""What must not leave the machine: home directories, the user's name, tokens. Packing refuses, and never edits."""

import getpass
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

TOKENS = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}",
    "a W&B key": r"(?i)api[_-]?key\W{0,12}[0-9a-f]{40}(?![0-9a-f])",
    "a secret key": r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
HOME = r"(?:/home/(?!linuxbrew/)|/Users/(?!Shared/)|[A-Za-z]:\\{1,2}Users\\{1,2})[^/\\\s\"'<>]+"


def refuse_private(name: str, content: bytes) -> None:
    """Raise ValueError that names the file and what was found in it; a token itself is not repeated."""
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    is_text = not name.endswith((".png", ".pdf"))  # where a short name may turn up by chance
    for found in _findings(content.decode("utf-8", errors="replace"), user=_user() if is_text else None):
        raise ValueError(f"{name}: holds {found}, and is not packed; remove that, or leave the file or its run out")


def _findings(text: str, *, user: str | None) -> Iterator[str]:
    home = str(Path.home())
    if home not in ("", "/") and re.search(rf"{re.escape(home)}(?![\w-])", text):
        yield f"this machine's home directory ({home})"
    if user and re.search(rf"[/\\]{re.escape(user)}(?=[/\\\s\"':,;<>)]|$)", text):
        yield f"the user name {user} in a path"
    other = re.search(HOME, text)
    if other:
        yield f"a home directory ({other[0]})"
    for what, pattern in TOKENS.items():
        token = re.search(pattern, text)
        if token:
            yield f"what looks like {what} (at character {token.start()})"


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without an entry for the user
        return None
