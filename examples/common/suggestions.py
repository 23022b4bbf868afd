"""What a mistyped word may have meant."""

from collections.abc import Iterable
from difflib import SequenceMatcher

ALIKE = 0.6  # difflib's own limit of what is a close match


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word most probably meant, or None.

    Case, and hyphens for underscores, do not count. A choice that begins with the word, or whose
    parts begin with its letters, is near; where two are equally near there is no telling.

    Example:
        >>> nearest("epoch", ["epochs", "seed"]), nearest("LR", ["learning-rate", "seed"])
        ('epochs', 'learning-rate')
        >>> nearest("centre_z", ["centre_a", "centre_b"]) is None
        True
    """
    scores = {choice: _likeness(_plain(word), _plain(choice)) for choice in choices}
    best = max(scores.values(), default=0.0)
    found = [choice for choice, score in scores.items() if score == best]
    return found[0] if len(found) == 1 and best >= ALIKE else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question that ends a complaint; empty if none is near.

    Example:
        >>> did_you_mean("tnet", ["none", "tent"])
        '; did you mean tent?'
    """
    choice = nearest(word, choices)
    return "" if choice is None else f"; did you mean {choice}?"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").lstrip("-")


def _likeness(word: str, choice: str) -> float:
    """From 0 to 1: the share of letters in common, in their order."""
    if not word:
        return 0.0
    letters = SequenceMatcher(None, word, choice, autojunk=False).ratio()
    parts = "".join(part[:1] for part in choice.split("-"))
    short = choice.startswith(word) or (len(word) > 1 and word == parts)
    return max(letters, ALIKE) if short else letters
