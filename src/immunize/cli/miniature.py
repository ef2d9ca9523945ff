"""`immunize-miniature OUTPUT_DIR`: rebuilds the miniature's tokenizer and both checkpoints from the seed.

Prints the SHA-256 of each file. The same bits come from the same versions of the packages on the
same kind of machine; elsewhere the last bits of the weights differ, which is why the weights are shipped.
"""

import sys
from pathlib import Path


def main() -> None:
    """The console command; about two minutes on two cores."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: immunize-miniature OUTPUT_DIR   (an empty or new directory)")
    directory = Path(sys.argv[1])
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SystemExit(f"{directory} is not an empty directory: nothing is overwritten")

    from immunize.data.miniature.checkpoints import build  # torch and transformers: only once there is work for them

    print(build(directory), end="")
