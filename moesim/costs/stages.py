"""Stages of a layer as a deployment runs them, where the machine was calibrated for the model: one measured time instead of the sum of its kernels.

The table `stage` holds what a rank does by itself – attention with its norms, router, shared experts, dense FFN, what comes before the layers (operator
`embedding`) and after them (`head`) – for the shape of one model. Attention depends on requests and context, everything else on tokens.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.interpolation import Curve, Grid
from moesim.costs.provenance import Timing, zero_where
from moesim.costs.tables import Rows, Tables
from moesim.model.moe_model import MoEModel

KIND = "stage"


def shape_of(model: MoEModel) -> dict[str, int | str]:
    """Return the columns that say which model a row is of."""
    attention = model.attention
    return {
        "hidden_size": model.hidden_size, "num_heads": attention.num_heads, "num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim,
        "inter_size": model.expert_ffn_size, "num_experts": model.num_experts, "num_topk": model.top_k, "vocab": model.vocab_size, "dtype": model.dtype,
    }  # fmt: skip


class StageCost:
    """Times of whole stages of one model; None where the machine was not calibrated for it."""

    def __init__(self, model: MoEModel, tables: Tables) -> None:
        self._model, self._tables = model, tables
        self._rows: dict[str, Rows | None] = {}
        self._curves: dict[str, Curve] = {}
        self._grids: dict[str, Grid] = {}

    def _of(self, operator: str) -> Rows | None:
        if operator not in self._rows:
            names = ("phase", "batch_size", "num_tokens", "context", "latency_s")
            where = {**shape_of(self._model), "operator": operator}
            self._rows[operator] = self._tables.rows(KIND, *names, where=where, transfer=False) if self._tables.own(KIND) else None
        return self._rows[operator]

    def attention(self, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray) -> Timing | None:
        """Return the time of the attention stage; arguments as for `CostModel.attention`. A cached prefix was not measured: None."""
        rows = self._of("attention")
        if rows is None:
            return None
        tokens = np.maximum(np.asarray(new_tokens, dtype=np.float64), 0.0)
        batch = np.clip(np.asarray(sequences, dtype=np.float64), 1.0, np.maximum(tokens, 1.0))
        length = np.asarray(context, dtype=np.float64)
        if phase == "prefill":
            if (length > (tokens / batch) * (1 + 1e-9)).any():
                return None
            length = tokens / batch
        if phase not in self._grids:
            mine = rows["phase"] == phase
            self._grids[phase] = Grid.build(rows["batch_size"][mine], rows["context"][mine], rows["latency_s"][mine])
        return zero_where(self._grids[phase](batch, np.maximum(length, 1.0)), tokens <= 0)

    def __call__(self, operator: str, tokens: np.ndarray) -> Timing | None:
        """Return the time of a stage that depends on its tokens; those of `head` are the requests whose next token it finds."""
        rows = self._of(operator)
        if rows is None:
            return None
        if operator not in self._curves:
            kept = rows["phase"] == "decode" if operator == "head" else np.ones(len(rows["phase"]), dtype=bool)
            keys, at = np.unique(rows["num_tokens"][kept], return_inverse=True)
            mean = np.bincount(at, weights=rows["latency_s"][kept]) / np.bincount(at)
            self._curves[operator] = Curve(keys.astype(np.float64), mean)
        return zero_where(self._curves[operator](tokens), tokens <= 0)
