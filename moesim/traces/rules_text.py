"""Read the parameters of a routing rule: `capacity:1.25,by=weight` has one value and one option.

Experts are listed as `3/8-11`, `none` is the empty list. Numbers that decide a rounding are read exactly, as fractions.
"""

from __future__ import annotations

from fractions import Fraction

from moesim.errors import InputError, describe

MAX_ID = 65535


class Words:
    """The comma-separated parameters of one rule; `end` refuses what nobody asked for."""

    def __init__(self, rule: str, text: str, usage: str) -> None:
        self.name = f"{rule}:{text}" if text else rule
        self.usage = usage
        words = [word.strip() for word in text.split(",")] if text else []
        self._values = [word for word in words if "=" not in word]
        self._options = dict(word.split("=", 1) for word in words if "=" in word)
        self._repeats = len(words) != len(self._values) + len(self._options)

    def refuse(self, key: str, value: object, rule: str) -> InputError:
        """Return the error for one parameter."""
        return InputError(describe(f"rule {self.name}", key, value, rule, f"write {self.usage}"))

    def value(self, key: str, default: str | None = None) -> str:
        """Return the next value, or the default; without one it must be there."""
        if self._values:
            return self._values.pop(0)
        if default is None:
            raise self.refuse(key, "", "is missing")
        return default

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return the next value as a whole number in low..high."""
        return self.as_whole(key, self.value(key, None if default is None else str(default)), low, high)

    def as_whole(self, key: str, text: str, low: int, high: int) -> int:
        """Return `text` as a whole number in low..high."""
        if not text.isascii() or not text.isdecimal() or len(text) > 9 or not low <= int(text) <= high:
            raise self.refuse(key, text, f"must be a whole number in {low}..{high}")
        return int(text)

    def fraction(self, key: str, text: str, high: float) -> Fraction:
        """Return `text` as an exact number in (0, high]."""
        try:
            number = Fraction(text) if len(text) <= 24 and "e" not in text.lower() else Fraction(0)
        except (ValueError, ZeroDivisionError):
            number = Fraction(0)
        if not 0 < number <= high:
            raise self.refuse(key, text, f"must be a number > 0 and <= {high:g}")
        return number

    def option(self, key: str, default: str) -> str:
        """Return the option `key=…`, or the default."""
        return self._options.pop(key, default)

    def end(self) -> None:
        """Raise InputError if something is left over."""
        if self._values or self._options or self._repeats:
            left = [*self._values, *(f"{key}={value}" for key, value in self._options.items())]
            raise self.refuse("parameters", ",".join(left), "are not understood or given twice")


def ids(text: str, words: Words) -> list[int]:
    """Return the experts of a list like `3/8-11`, ascending; `none` is empty."""
    if text == "none":
        return []
    found: set[int] = set()
    for part in text.split("/"):
        low, dash, high = part.partition("-")
        start = words.as_whole("expert", low, 0, MAX_ID)
        found.update(range(start, (words.as_whole("expert", high, start, MAX_ID) if dash else start) + 1))
    return sorted(found)
