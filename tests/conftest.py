"""How the tests draw their random examples: the same ones in every run, unless MOESIM_RANDOM_TESTS asks for new ones.

A tree that was green stays green; `make test-all` draws anew, so that what fixed examples miss is found there.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("default" if os.environ.get("MOESIM_RANDOM_TESTS") else "fixed")
