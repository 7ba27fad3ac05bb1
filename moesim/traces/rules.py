"""Routing rules by name: a text like `top_k:2+capacity:1.25` becomes the rules that it lists, applied from left to right.

What a rule is and sees: `rules_view`. Rules that choose among the recorded candidates: `rules_select`; expert kinds,
capacity, layers: `rules_capacity`. A rule that needs what a trace lacks refuses, saying what is missing.
Weights stay as recorded; only `renormalise` changes them, so that a text says where the sum is made 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from moesim.errors import InputError, describe
from moesim.traces import rules_capacity, rules_select
from moesim.traces.rules_view import Rule

RULES: Mapping[str, Callable[[str], Rule]] = {**rules_select.RULES, **rules_capacity.RULES}
"""Name → maker, which is given what follows the colon."""


def parts_of(text: str) -> list[str]:
    """Return the rules of a text in their order; raise InputError for an empty one."""
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise InputError(describe("routing rule", "text", text, "must be rules separated by '+'", "like top_k:2+capacity:1.25"))
    return parts


def rules_of(text: str) -> list[Rule]:
    """Return the rules that a text names; raise InputError for an unknown rule or a bad parameter."""
    made = []
    for part in parts_of(text):
        name, _, parameter = part.partition(":")
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            raise InputError(describe("routing rule", "name", name, "is not known", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RULES)}"))
        made.append(RULES[name](parameter))
    return made
