"""Finding the measured tables of a cluster: stems by kind, rows by key.

A stem is `<kind>_<engine and version>` (`moe_sglang0.5.14`, `nccl2.29.2`). The table of the wanted engine wins; another engine's is used where it
has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.hardware.cluster import Cluster

MOE_DTYPES = {"fp8": "fp8_block", "bfloat16": "bfloat16", "float16": "bfloat16", "mxfp4": "w4a16_mxfp4", "int4": "int4_wo"}
"""Model's expert dtype → `moe_dtype` of the tables."""
LINEAR_DTYPES = {"bfloat16": "bfloat16", "float16": "bfloat16"}
"""Model's weight dtype → `gemm_dtype` of the tables; FP8 depends on how it is scaled."""
_STEM = re.compile(r"^(?P<kind>[a-z0-9_]*?)_?(?P<version>(?:sglang|trtllm|vllm|nccl)\d[\w.]*)$")


class Tables:
    """The tables of one cluster, as seen by one serving engine."""

    def __init__(self, cluster: Cluster, engine: str) -> None:
        self._cluster = cluster
        self._stems: dict[str, str] = {}
        if cluster.tables is None:
            return
        from moesim.hardware.tables import table_names

        for stem in table_names(cluster):
            match = _STEM.match(stem)
            if match is None:
                continue
            kind = match["kind"] or "nccl"
            if kind not in self._stems or match["version"].startswith(engine):
                self._stems[kind] = stem

    def stem(self, kind: str) -> str | None:
        """Return the stem of a kind of table (`gemm`, `moe`, `deepep_ll_1node` …), or None."""
        return self._stems.get(kind)

    def label(self, kind: str) -> str:
        """Return the stem, or the kind where there is no such table; for messages."""
        return self._stems.get(kind, f"{kind} (none)")

    def rows(self, kind: str, *columns: str, where: Mapping[str, Any] | None = None) -> dict[str, np.ndarray] | None:
        """Return the columns of the rows that equal `where`, or None if there is no such table or row."""
        stem = self._stems.get(kind)
        if stem is None:
            return None
        from moesim.hardware.tables import read_table

        rows = read_table(self._cluster, stem, columns, where=where)
        return rows if len(rows[columns[0]]) else None
