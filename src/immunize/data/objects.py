"""Which objects are only for evaluation: one rule for domains, tasks and splits."""

import hashlib
from collections.abc import Sequence


def evaluation_objects(domain: str, objects: Sequence[str], share: float) -> list[str]:
    """The last `share` of one category's objects in the order of a fixed hash.

    The hash is of `domain/object` alone: the same objects are held out for every seed, and adding a category
    moves no object of another.
    """
    ordered = sorted(objects, key=lambda name: hashlib.sha256(f"{domain}/{name}".encode()).hexdigest())
    return ordered[len(ordered) - round(share * len(ordered)) :]
