"""Words of messages: lists of names, numbers with their nouns."""

from collections.abc import Iterable


def join_names(names: Iterable[str], shown: int = 10) -> str:
    """Join names with commas for a message; only count those beyond the first few."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def count_nouns(number: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun, in the plural where there is not exactly one."""
    return f"{number:,} {noun}{plural * (number != 1)}"
