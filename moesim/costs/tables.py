"""Finding the measured tables of a cluster: stems by kind, rows by key; a donor's, transferred, where the device has none.

A stem is `<kind>_<engine and version>` (`moe_sglang0.5.14`, `nccl2.29.2`, `gemm_infersim`). The table of the wanted engine wins; another engine's is
used where it has none. A device without a table of a kind takes the rows of the device that its description names in `calibrated_from`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.costs.provenance import Provenance
from moesim.hardware.cluster import Cluster

MOE_DTYPES = {"fp8": "fp8_block", "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16", "mxfp4": "w4a16_mxfp4", "int4": "int4_wo"}
"""Model's expert dtype → `moe_dtype` of the tables."""
LINEAR_DTYPES = {"bfloat16": "bfloat16", "float16": "bfloat16"}
"""Model's weight dtype → `gemm_dtype` of the tables; FP8 depends on how it is scaled."""
_STEM = re.compile(r"^(?P<kind>[a-z0-9_]*?)_?(?P<version>(?:sglang|trtllm|vllm|nccl|torch)\d[\w.]*|infersim|frontier|llmservingsim|vidur)$")


class Rows(dict[str, np.ndarray]):
    """Columns of equal length, and the best class that a time read from them can have."""

    worst: Provenance = Provenance.MEASURED


def kind_of(stem: str) -> tuple[str, str] | None:
    """Return (kind, engine and version) of a table's stem, or None."""
    match = _STEM.match(stem)
    return (match["kind"] or "nccl", match["version"]) if match else None


class Tables:
    """The tables of one cluster, as seen by one serving engine."""

    def __init__(self, cluster: Cluster, engine: str) -> None:
        self._cluster = cluster
        self._engine = engine
        self._stems: dict[str, str] = {}
        self._donor: Tables | None = None
        self._overheads: dict[tuple[str, str], float] = {}
        if cluster.tables is None:
            return
        from moesim.hardware.tables import table_names

        for stem in table_names(cluster):
            found = kind_of(stem)
            if found is not None and (found[0] not in self._stems or found[1].startswith(engine)):
                self._stems[found[0]] = stem

    @property
    def cluster(self) -> Cluster:
        """The device whose tables these are."""
        return self._cluster

    @property
    def engine(self) -> str:
        """The serving engine whose tables are preferred."""
        return self._engine

    def seen_by(self, engine: str) -> Tables:
        """Return the same device's tables as another engine sees them."""
        return Tables(self._cluster, engine)

    @property
    def donor(self) -> Tables | None:
        """The tables of the device that `calibrated_from` names."""
        if self._donor is None and self._cluster.calibrated_from is not None:
            from moesim.hardware.load import load_cluster

            self._donor = Tables(load_cluster(f"{self._cluster.calibrated_from}-1"), self._engine)
        return self._donor

    def own(self, kind: str) -> bool:
        """Return whether the device itself was measured."""
        return kind in self._stems

    def prefers(self, kind: str) -> bool:
        """Return whether the table of a kind, own or else the donor's, is the wanted engine's."""
        if kind in self._stems:
            return (kind_of(self._stems[kind]) or ("", ""))[1].startswith(self._engine)
        return self.donor is not None and self.donor.prefers(kind)

    def stem(self, kind: str) -> str | None:
        """Return the stem of a kind of table (`gemm`, `moe`, `deepep_ll_1node` …), or None."""
        return self._stems.get(kind)

    def label(self, kind: str) -> str:
        """Return the stem, or the kind where there is no such table; for messages."""
        return self._stems.get(kind, f"{kind} (none)")

    def has(self, kind: str, column: str) -> bool:
        """Return whether the table of a kind, own or else the donor's, has a column."""
        if kind not in self._stems:
            return self.donor is not None and self.donor.has(kind, column)
        from moesim.hardware.tables import table_metadata

        return column in table_metadata(self._cluster, self._stems[kind])["columns"]

    def rows(self, kind: str, *columns: str, where: Mapping[str, Any] | None = None, transfer: bool = True) -> Rows | None:
        """Return the columns of the rows that equal `where`, or None if there is no such table or row, here or (with `transfer`) at the donor."""
        found = self._own_rows(kind, columns, where)
        return found if found is not None or not transfer else self._transferred(kind, columns, where)

    def donated(self, kind: str, *columns: str, where: Mapping[str, Any] | None = None) -> Rows | None:
        """Return the donor's rows, transferred, even where the device has some of its own."""
        return self._transferred(kind, columns, where)

    def _own_rows(self, kind: str, columns: tuple[str, ...], where: Mapping[str, Any] | None) -> Rows | None:
        stem = self._stems.get(kind)
        if stem is None:
            return None
        from moesim.hardware.tables import read_table

        rows = read_table(self._cluster, stem, columns, where=where)
        return Rows(rows) if len(rows[columns[0]]) else None

    def _transferred(self, kind: str, columns: tuple[str, ...], where: Mapping[str, Any] | None) -> Rows | None:
        from moesim.costs.transfer import NEEDED, factors

        donor = self.donor
        if donor is None or kind not in NEEDED:
            return None
        rows = donor.rows(kind, *dict.fromkeys((*columns, *NEEDED[kind])), where=where)
        if rows is None:
            return None
        ratio = factors(kind, rows, donor._cluster, self._cluster)
        result = Rows()
        result.worst = Provenance.EXTRAPOLATED
        for name in columns:
            result[name] = rows[name]
            if name.endswith("_s"):
                least = donor._overhead(kind, name)
                result[name] = least + (rows[name] - least) * ratio
        return result

    def _overhead(self, kind: str, column: str) -> float:
        """Return what the smallest kernel of a table takes."""
        if (kind, column) not in self._overheads:
            from moesim.hardware.tables import read_table

            self._overheads[kind, column] = float(read_table(self._cluster, self._stems[kind], [column])[column].min())
        return self._overheads[kind, column]
