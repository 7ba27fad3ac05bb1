"""What changes during a run: a balancer, failures, ranks that join or leave: the settings `change.…`.

The defaults turn the group off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSettings:
    """Settings of the group `change`."""

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != ChangeSettings()
