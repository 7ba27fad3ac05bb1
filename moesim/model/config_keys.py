"""Typed access to one Hugging Face `config.json`: aliases of a key, bounds, and errors that name the file and the key.

A value of null counts as absent, as it does for the libraries that write these files. Numbers must be whole where they count something;
absurd sizes are refused, because a size that overflows a run is a typo or an attack.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from moesim.errors import ModelError, describe


class Keys:
    """One config (its text part), with fallbacks to the outer level."""

    def __init__(self, node: Mapping[str, Any], outer: Mapping[str, Any], place: str) -> None:
        self.node, self.outer, self.place = node, outer, place

    def get(self, *names: str) -> tuple[str, Any]:
        """Return (name, value) of the first of `names` that has a value, looking inside before outside; ("", None) if there is none."""
        for source in (self.node, self.outer):
            for name in names:
                if source.get(name) is not None:
                    return name, source[name]
        return "", None

    def missing(self, names: Sequence[str], why: str = "") -> ModelError:
        """Return the error for a required key that is not there."""
        near = difflib.get_close_matches(names[0], [str(key) for key in self.node if key not in names], n=1, cutoff=0.8)
        hint = f"did you mean {names[0]!r} where it says {near[0]!r}?" if near else "add it" + (f" ({why})" if why else "")
        return ModelError(f"{self.place}: {' or '.join(names)}: is missing; {hint}")

    def whole(self, *names: str, low: int, high: int, default: int | None = None, required: bool = True, layers: int = 0) -> int | None:
        """Return the whole number under the first of `names` that is there, in low..high; layers: a list may say it once for each of so many."""
        name, value = self.get(*names)
        if layers and isinstance(value, list) and len(value) == layers and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            if default is None and required:
                raise self.missing(names)
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(describe(self.place, name, value, "must be a whole number"))
        if not low <= value <= high:
            raise ModelError(describe(self.place, name, value, f"must be in {low}..{high}"))
        return value

    def need(self, *names: str, low: int, high: int, default: int | None = None, layers: int = 0) -> int:
        """Return a whole number that must be there, or its default."""
        value = self.whole(*names, low=low, high=high, default=default, layers=layers)
        assert value is not None
        return value

    def text(self, *names: str, default: str | None = None) -> str | None:
        """Return the text under the first of `names` that is there."""
        name, value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
            raise ModelError(describe(self.place, name, value, "must be a short text"))
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a boolean, or its default."""
        _, value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(describe(self.place, name, value, "must be true or false"))
        return value

    def whole_list(self, name: str, *, low: int, high: int) -> list[int] | None:
        """Return a list of whole numbers in low..high, or None."""
        _, value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > 100_000 or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise ModelError(describe(self.place, name, value, "must be a list of whole numbers"))
        for item in value:
            if not low <= item <= high:
                raise ModelError(describe(self.place, name, item, f"must hold numbers in {low}..{high}"))
        return value

    def text_list(self, name: str, *, length: int) -> list[str] | None:
        """Return a list of `length` texts, or None."""
        _, value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelError(describe(self.place, name, value, "must be a list of texts"))
        if len(value) != length:
            raise ModelError(describe(self.place, name, f"{len(value)} entries", f"must have one per layer ({length})"))
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object, or None."""
        _, value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ModelError(describe(self.place, name, value, "must be a JSON object"))
        return value
