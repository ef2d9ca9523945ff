"""Nonsense words. English words, well-known names and peoples are rejected, and parts that could begin a real slur."""

import hashlib
import itertools
from collections.abc import Iterable

_CONSONANTS = "bdfklmrstvz"
_VOWELS = "aeiou"
_CODAS = "lrmx"

_PARTS = "fuk fag fart dik kok tit kak kaf sek kum kun tur rak rap tard ret kill suk vat sex mor kurd serb malt dam"
_WORDS = """
bake baki bale bali bare base bide bike bile bite bone bore dale dame dare data date demo dike dire diva dive dora
dose dote dove dude fade fake fame fare fate feta fida file fire five foe fuse kale kali kilo kite kobe lake lama
lame late lava laze lido life like lima lime line lira lire lisa lite lobe lola lolo lose love lure luri make male
mali mare mate maze mere mila mile mira mire miso mode mole more move mule muse mute rare rate raze reli ride rise
rita rite robe rode role rome rosa rose rude rule sade safe sake saki sale same sara sari save semi siba sida side
silo site siva size soda sofa sole solo some sore sumo sure take tale tali talu tame tara tile time tire toba tofu
toka tore tori tuba tube vale vase veda vera veto vibe vile vili vita vote were zero zeta zola
"""
_REJECTED_PARTS = frozenset(_PARTS.split())
_REJECTED_WORDS = frozenset(_WORDS.split())


def short_words(seed: int) -> list[str]:
    """All acceptable words of two open syllables (`bado`), in an order that depends on the seed alone."""
    return _ordered((f"{first}{last}" for first, last in itertools.product(_open(), _open())), seed)


def long_words(seed: int) -> list[str]:
    """All acceptable words of three syllables with a closed first one (`zorvexa`), in the order of the seed."""
    closed = [f"{opening}{coda}" for opening in _open() for coda in _CODAS]
    endings = short_words(seed)[-40:]  # some 8,000 words are plenty, and sorted in no time
    return _ordered((f"{first}{last}" for first, last in itertools.product(closed, endings)), seed)


def rank(seed: int, purpose: str, item: object) -> str:
    """A sort key that is a pure function of its arguments; Python's `random` promises less across versions."""
    return hashlib.sha256(f"{seed}/{purpose}/{item}".encode()).hexdigest()


def _open() -> list[str]:
    return [f"{consonant}{vowel}" for consonant, vowel in itertools.product(_CONSONANTS, _VOWELS)]


def _ordered(words: Iterable[str], seed: int) -> list[str]:
    return sorted(filter(_acceptable, words), key=lambda word: rank(seed, "word", word))


def _acceptable(word: str) -> bool:
    consonants = [letter for letter in word if letter not in _VOWELS]
    repeats = len(set(consonants)) < len(consonants)  # baby talk, and many real words
    return not repeats and word not in _REJECTED_WORDS and not any(part in word for part in _REJECTED_PARTS)
