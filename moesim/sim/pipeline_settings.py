"""Pipeline stages, training and chunked exchanges: the settings `pipeline.…`.

The defaults turn the group off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """Settings of the group `pipeline`."""

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != PipelineSettings()
