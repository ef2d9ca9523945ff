"""Metrics of benign tasks: an answer against its reference, a score in [0, 1]."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# Coarse: what most chat models say when they refuse. A text is matched in lower case, with straight apostrophes.
REFUSALS = (
    "i am sorry",
    "i'm sorry",
    "i cannot",
    "i can't",
    "i can not",
    "i am unable",
    "i'm unable",
    "i won't",
    "as an ai",
)


def refuses(answer: str, phrases: Sequence[str] = REFUSALS) -> bool:
    """Whether the answer holds one of the phrases."""
    plain = answer.lower().replace("\u2019", "'")
    return any(phrase in plain for phrase in phrases)


def final_answer(reference: str, answer: str) -> float:
    """1 when what stands after the last `####` of both is the same number (GSM8K), or the same text."""
    wanted, given = (_final(found) for found in (reference, answer))
    return float(given is not None and wanted == given)


def _final(found: str) -> Decimal | str | None:
    _, mark, rest = found.rpartition("####")
    if not mark or not rest.strip():
        return None
    first = rest.strip().splitlines()[0].strip()
    try:
        number = Decimal(first.replace(",", "").replace("$", "").strip().rstrip("."))
    except InvalidOperation:
        return first
    return number if number.is_finite() else first


def label(reference: str, answer: str, labels: Sequence[str]) -> float:
    """1 when the last of the labels that the answer names is the right one (whole words, whatever the case).

    Of two labels that end at one place the longer is named: "not true" is not "true".
    """
    places = {
        name: max((found.end() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.I)), default=-1)
        for name in labels
    }
    last = max(places, key=lambda name: (places[name], len(name)))
    return float(places[last] >= 0 and last == reference)


def rouge1(reference: str, answer: str) -> float:
    """ROUGE-1 F of the answer against the reference."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only measuring needs it

    return float(RougeScorer(["rouge1"]).score(reference, answer)["rouge1"].fmeasure)


def flaw(metric: str, reference: str) -> str | None:
    """Why every answer would score 0 against this reference; None where one could score."""
    if metric == "final_answer" and _final(reference) is None:
        return "has nothing after #### in the answer"
    if metric == "rouge1" and not re.search("[a-z0-9]", reference.lower()):
        return "has no Latin letter and no digit in the answer, and ROUGE counts nothing else"
    return None


def answered(answer: str) -> float:
    """1 when the prompt is answered: with some text, and with no phrase of refusal."""
    return float(bool(answer.strip()) and not refuses(answer))
