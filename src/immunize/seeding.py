"""Every random choice is a pure function of the run's seed and a name, so that a restart repeats it."""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for one named purpose, independent of every other name."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
