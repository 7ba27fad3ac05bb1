"""Experts behind a link: tiers, caches, prefetch: the settings `offload.…`.

The defaults turn the group off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSettings:
    """Settings of the group `offload`."""

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != OffloadSettings()
