"""One layer's attention block: norm, projections, rotary and cache write, core attention, output projection.

Prefill time of the core is linear in causal work L·(L + c) of the prompt length L, decode time in batch and KV length; both come from grids per head
shape. A cached prefix of P tokens adds new·P pairs, at the time per pair that the second difference of the prompt grid shows. MLA of DeepSeek-V3's
dimensions has a table of the whole block, projections included; its cache, and so its scores of prompts, are FP8. All sizes are per rank; `tp` ranks
share the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.costs.gemm import Gemm
from moesim.costs.interpolation import Grid, identity, quadratic
from moesim.costs.mixed import MixedBatches
from moesim.costs.provenance import Policy, Provenance, Timing, total, zero_where
from moesim.costs.roofline import Roofline
from moesim.costs.tables import Tables
from moesim.errors import CostError, describe
from moesim.model.moe_model import DTYPE_BYTES, Attention, MoEModel

Phase = Literal["prefill", "decode"]
PHASES = ("prefill", "decode")
CORE_OFFSET, BLOCK_OFFSET = 512.0, 2048.0
"""Tokens at which the linear part of prefill equals the quadratic one; chosen by leave-one-out error (see benchmarks/bench_costs.py)."""
MANY, LONG = 32, 4096
"""Heads and tokens of a prompt from which scores are what a call of prefill attention spends its time on."""
_DEEPSEEK_V3 = dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


@dataclass(frozen=True, slots=True)
class _Core:
    """A grid of one head shape and what it takes to use it for another."""

    grid: Grid
    scale: float
    worst: Provenance
    pair_s: float
    """Seconds per (new token, cached token) pair of one sequence, prefill only."""
    over_prefix: Grid | None = None
    """One sequence's new tokens over a cached prefix, where the table has them."""

    def rescaled(self, seconds: np.ndarray, scale: float) -> np.ndarray:
        """Return times for another shape: all but what the smallest call takes grows by `scale`."""
        if scale == 1.0:
            return seconds
        least = float(self.grid.seconds.min())
        return least + (seconds - least) * scale


class AttentionCost:
    """Times of the attention block of one model on one device."""

    def __init__(self, model: MoEModel, tables: Tables, gemm: Gemm, roofline: Roofline, policy: Policy, linear_dtype: str) -> None:
        self._model = model
        self._tables = tables
        self._gemm = gemm
        self._roofline = roofline
        self._policy = policy
        self._dtype = linear_dtype
        self._cores: dict[tuple[object, ...], _Core | None] = {}
        self._mixed: dict[tuple[int, int, int], MixedBatches | None] = {}
        self._bytes = DTYPE_BYTES.get(model.dtype, 2.0)
        self._kv_bytes = DTYPE_BYTES.get(model.kv_dtype, 2.0)

    def __call__(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int) -> Timing:
        """Return the time of one layer's block; see `CostModel.attention`."""
        tokens = np.maximum(np.asarray(new_tokens, dtype=np.float64), 0.0)
        parts = (*self._projections(tokens, tp), *self._core_of(phase, sequences, new_tokens, context, tp))
        return zero_where(total(*parts), tokens <= 0)

    def projections(self, tokens: np.ndarray, tp: int) -> Timing:
        """Return the part of the block that depends on its tokens alone: the norm and, but for MLA, projections and rotary embedding."""
        return zero_where(total(*self._projections(tokens, tp)), tokens <= 0)

    def before_scores(self, tokens: np.ndarray, tp: int) -> Timing:
        """Return the part of a decode block that comes before its scores: norm, projections of queries, keys and values, rotary embedding."""
        norm, *rest = self._projections(tokens, tp)
        parts = self._mla_before_scores("decode", tokens, self._model.attention.num_heads // tp) if self._model.attention.kind == "mla" else rest[:2]
        return zero_where(total(norm, *parts), tokens <= 0)

    def core_of(self, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int) -> Timing:
        """Return the part of the block that depends on phase and context: scores and values, for MLA its projections too, whose form differs by phase."""
        return zero_where(total(*self._core_of(phase, sequences, new_tokens, context, tp)), np.asarray(new_tokens) <= 0)

    def mixed_batches(self, tp: int) -> MixedBatches | None:
        """Return what the scores of a batch of both phases take over those of each phase; None where the device has no table of it."""
        attention = self._model.attention
        if attention.kind == "mla" or attention.sliding_window:
            return None
        return self.mixed_of((attention.num_heads // tp, max(attention.num_kv_heads // tp, 1), attention.head_dim))

    def mixed_of(self, shape: tuple[int, int, int]) -> MixedBatches | None:
        """Return the same of a head shape: heads, KV heads, head dim."""
        if shape not in self._mixed:
            names = dict(zip(("num_heads", "num_key_value_heads", "head_dim"), shape, strict=True))
            sizes = dict(zip(("heads", "kv_heads", "head_dim"), shape, strict=True))

            def apart(chunk: np.ndarray, prefix: np.ndarray, decodes: np.ndarray, kv_length: np.ndarray) -> np.ndarray:
                prompt = self.core("prefill", np.ones(len(chunk)), chunk, chunk + prefix, **sizes)
                return prompt.seconds + self.core("decode", decodes, decodes, kv_length, **sizes).seconds

            cache = "fp8" if self._model.kv_dtype == "fp8" else "bfloat16"
            self._mixed[shape] = MixedBatches.build(self._tables, {**names, "kv_cache_dtype": cache}, apart)
        return self._mixed[shape]

    def _projections(self, tokens: np.ndarray, tp: int) -> tuple[Timing, ...]:
        attention, hidden = self._model.attention, self._model.hidden_size
        if tp < 1 or attention.num_heads % tp:
            raise CostError(describe("attention", "tp", tp, f"must divide the {attention.num_heads} heads of {self._model.name}"))
        norm = self._roofline.stream("norm", 3.0 * tokens * hidden * self._bytes)
        if attention.kind == "mla":
            return (norm,)
        heads, kv_heads = attention.num_heads // tp, max(attention.num_kv_heads // tp, 1)
        width = (heads + 2 * kv_heads) * attention.head_dim
        return (
            norm,
            self._gemm("attention.qkv", tokens, width, hidden, self._dtype),
            self._roofline.stream("rotary", 2.0 * tokens * width * self._bytes),
            self._gemm("attention.output", tokens, hidden, heads * attention.head_dim, self._dtype),
        )

    def _core_of(self, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int) -> tuple[Timing, ...]:
        if phase not in PHASES:
            raise CostError(describe("attention", "phase", phase, f"must be one of {', '.join(PHASES)}"))
        attention = self._model.attention
        arrays = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (sequences, new_tokens, context)))
        tokens = np.maximum(arrays[1], 0.0)
        batch = np.clip(arrays[0], 1.0, np.maximum(tokens, 1.0))
        kv_length = np.maximum(arrays[2], tokens / batch)
        if attention.kind == "mla":
            return self._mla(phase, batch, tokens, kv_length, tp)
        return (self._layers_mean(phase, batch, tokens, kv_length, attention.num_heads // tp, max(attention.num_kv_heads // tp, 1), attention),)

    # --- MHA and GQA ------------------------------------------------------------------------------------------

    def _layers_mean(self, phase: str, batch: np.ndarray, tokens: np.ndarray, kv_length: np.ndarray, heads: int, kv_heads: int, attention: Attention) -> Timing:
        full = self.core(phase, batch, tokens, kv_length, heads=heads, kv_heads=kv_heads, head_dim=attention.head_dim)
        if not attention.sliding_window or not attention.sliding_every:
            return full
        windowed = self.core(phase, batch, tokens, kv_length, heads=heads, kv_heads=kv_heads, head_dim=attention.head_dim, window=attention.sliding_window)
        share = 1.0 / attention.sliding_every
        return total(windowed.scaled(share), full.scaled(1.0 - share))

    def core(
        self,
        phase: str,
        batch: np.ndarray,
        tokens: np.ndarray,
        kv_length: np.ndarray,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int = 0,
        value_dim: int = 0,
    ) -> Timing:
        """Return the time of the attention kernel alone; `value_dim` differs from `head_dim` in MLA's expanded form only."""
        key = (phase, heads, kv_heads, head_dim, window)
        if key not in self._cores:
            self._cores[key] = self._gqa_core(phase, heads, kv_heads, head_dim, window)
        narrower = (head_dim + (value_dim or head_dim)) / (2.0 * head_dim)
        seen = np.minimum(kv_length, window) if window else kv_length
        read = batch * seen * 2.0 * kv_heads * head_dim * self._kv_bytes
        found = self._cores[key]
        if found is None:
            table = self._tables.label("attn_context" if phase == "prefill" else "attn_generation")
            missing = f"num_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim}, window_size={window}"
            self._policy.fall_back(f"attention.{phase}", table, missing, Provenance.ROOFLINE)
            new = tokens / batch
            pairs = batch * new * np.minimum(kv_length - new / 2, seen)
            return self._roofline.kernel(4.0 * pairs * heads * head_dim * narrower, read + 4.0 * tokens * heads * head_dim, self._model.dtype)
        worst = found.worst if narrower == 1.0 else max(found.worst, Provenance.CALIBRATED)
        return self._evaluate(found, phase, batch, tokens, kv_length, read, window, worst, found.scale * narrower)

    def _evaluate(
        self,
        found: _Core,
        phase: str,
        batch: np.ndarray,
        tokens: np.ndarray,
        kv_length: np.ndarray,
        read: np.ndarray,
        window: int,
        worst: Provenance,
        scale: float,
    ) -> Timing:
        if phase == "decode":
            timed = found.grid(tokens, kv_length)
            return Timing(seconds=found.rescaled(timed.seconds, scale), provenance=np.maximum(timed.provenance, np.uint8(worst)))
        new = tokens / batch
        timed = found.grid(batch, new)
        prefix = kv_length - new
        if window:
            prefix = np.minimum(prefix, window)
        cached = prefix > 1e-9
        if found.over_prefix is not None and cached.any():
            # The prefix adds to every sequence of the batch what it adds to one.
            alone, over = found.over_prefix(new, np.zeros(new.shape)), found.over_prefix(new, prefix)
            more = np.where(cached, np.maximum(over.seconds - alone.seconds, 0.0) * batch, 0.0)
            codes = np.where(cached & (batch > 1), np.uint8(Provenance.CALIBRATED), np.maximum(timed.provenance, over.provenance))
            seconds = found.rescaled(np.where(cached & (batch == 1), over.seconds, timed.seconds + more), scale)
            return Timing(seconds=seconds, provenance=np.maximum(codes, np.uint8(worst)))
        pairs = np.where(cached, batch * new * prefix, 0.0)
        seconds = found.rescaled(timed.seconds + pairs * found.pair_s, scale)
        # Few new tokens over a long prefix: reading the cache is what takes the time.
        seconds = np.where(cached, np.maximum(seconds, self._roofline.launch_s + read / self._roofline.reached_Bps), seconds)
        codes = np.where(cached, np.uint8(Provenance.CALIBRATED), timed.provenance)
        return Timing(seconds=seconds, provenance=np.maximum(codes, np.uint8(worst)))

    def _gqa_core(self, phase: str, heads: int, kv_heads: int, head_dim: int, window: int) -> _Core | None:
        kind, length = ("attn_context", "isl") if phase == "prefill" else ("attn_generation", "step")
        names = ("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype", "attn_dtype", "batch_size", length, "latency_s")
        cache = "fp8" if self._model.kv_dtype == "fp8" else "bfloat16"
        more = ("prefix",) if self._tables.has(kind, "prefix") else ()
        rows = None
        if self._model.dtype == "float32":
            rows = self._tables.rows(kind, *names, *more, where={"kv_cache_dtype": "float32", "attn_dtype": "float32"}, transfer=False)
        # New keys are in the cache when scores are computed: where it holds 8 bits, kernels for prompts compute in as many.
        for compute in dict.fromkeys((cache if phase == "prefill" else "bfloat16", "bfloat16")):
            if rows is None:
                rows = self._tables.rows(kind, *names, *more, where={"kv_cache_dtype": cache, "attn_dtype": compute})
        if rows is None:
            return None
        wanted = np.array([heads, kv_heads, head_dim, window])
        shapes = np.stack([rows[name] for name in names[:4]], axis=1)
        codes = shapes @ np.array([1 << 44, 1 << 30, 1 << 16, 1])
        first = np.unique(codes, return_index=True)[1]
        known = shapes[first]
        distance = np.abs(np.log2(known[:, :3] / wanted[:3])) @ np.array([1.0, 1.0, 4.0])
        distance = distance + 64.0 * (known[:, 3] > 0) * (window == 0)
        distance = distance + (np.abs(np.log2((known[:, 3] + 1) / (window + 1))) * (2.0 if window else 0.0))
        best = int(np.argmin(distance))
        used = known[best]
        if window == 0 and used[3] > 0:
            return None
        mine = codes == codes[first[best]]
        over = _over_prefix(rows, mine) if more else None
        if more:
            mine &= rows["prefix"] == 0
        offset = 0 if phase == "prefill" else 1
        grid = _build_grid(rows["batch_size"][mine], rows[length][mine] + offset, rows["latency_s"][mine], phase, CORE_OFFSET if not window else None)
        work = float(wanted[0] * wanted[2]) / float(used[0] * used[2]) if phase == "prefill" else float(wanted[1] * wanted[2]) / float(used[1] * used[2])
        exact = bool((used == wanted).all())
        missing = f"num_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim}, window_size={window}"
        worst = max(rows.worst, Provenance.MEASURED if exact else Provenance.CALIBRATED)
        if worst > Provenance.MEASURED:
            self._policy.fall_back(f"attention.{phase}", self._tables.label(kind), missing, worst)
        return _Core(grid, work, worst, _pair_seconds(grid) if phase == "prefill" else 0.0, over)

    # --- MLA --------------------------------------------------------------------------------------------------

    def _mla(self, phase: str, batch: np.ndarray, tokens: np.ndarray, kv_length: np.ndarray, tp: int) -> tuple[Timing, ...]:
        attention, hidden = self._model.attention, self._model.hidden_size
        heads = attention.num_heads // tp
        cached_width = (attention.kv_lora_rank or 0) + (attention.qk_rope_head_dim or 0)
        read = batch * kv_length * cached_width * self._kv_bytes
        block = self._block(phase, heads)
        if block is not None:
            return (self._evaluate(block, phase, batch, tokens, kv_length, read, 0, block.worst, block.scale),)
        nope, rope, value = attention.qk_nope_head_dim or 0, attention.qk_rope_head_dim or 0, attention.v_head_dim or attention.head_dim
        lora = attention.kv_lora_rank or 0
        parts = self._mla_before_scores(phase, tokens, heads)
        if phase == "prefill":
            parts.append(self.core(phase, batch, tokens, kv_length, heads=heads, kv_heads=heads, head_dim=nope + rope, value_dim=value))
        else:
            parts.append(self._mla_decode(batch, tokens, kv_length, read, heads))
            parts.append(self._gemm("attention.absorb_v", tokens, heads * value, lora, "bfloat16"))
        parts.append(self._gemm("attention.output", tokens, hidden, heads * value, self._dtype))
        return tuple(parts)

    def _mla_before_scores(self, phase: str, tokens: np.ndarray, heads: int) -> list[Timing]:
        attention, hidden = self._model.attention, self._model.hidden_size
        nope, rope, value = attention.qk_nope_head_dim or 0, attention.qk_rope_head_dim or 0, attention.v_head_dim or attention.head_dim
        lora, rank = attention.kv_lora_rank or 0, attention.q_lora_rank
        parts = [
            self._gemm("attention.kv_a", tokens, (rank or 0) + lora + rope, hidden, self._dtype),
            self._gemm("attention.q_b", tokens, heads * (nope + rope), rank or hidden, self._dtype),
            self._roofline.stream("rotary", 2.0 * tokens * (heads * (nope + rope) + lora + rope) * self._bytes),
        ]
        if phase == "prefill":
            return [*parts, self._gemm("attention.kv_b", tokens, heads * (nope + value), lora, self._dtype)]
        return [*parts, self._gemm("attention.absorb_k", tokens, heads * lora, nope, "bfloat16")]

    def _block(self, phase: str, heads: int) -> _Core | None:
        """Return the table of the whole MLA block, if the model has the dimensions it was measured at."""
        key = ("block", phase, heads)
        if key in self._cores:
            return self._cores[key]
        attention = self._model.attention
        found: _Core | None = None
        same = all(getattr(attention, name) == value for name, value in _DEEPSEEK_V3.items())
        if same and self._model.hidden_size == 7168 and self._dtype == "fp8_block":
            kind = "wideep_mla_context" if phase == "prefill" else "wideep_mla_generation"
            rows = self._tables.rows(kind, "batch_size", "isl", "latency_s", where={"num_heads": heads, "kernel_source": "fa3"})
            if rows is not None:
                seconds = rows["latency_s"]
                grid = _build_grid(rows["batch_size"], rows["isl"], seconds, phase, BLOCK_OFFSET)
                if phase == "prefill" and self._model.kv_dtype != "fp8":
                    seconds = seconds + rows["batch_size"] * rows["isl"] ** 2.0 / 2 * _pair_seconds(grid) * (self._fp8_gain() - 1.0)
                    grid = _build_grid(rows["batch_size"], rows["isl"], seconds, phase, BLOCK_OFFSET)
                own = self._model.kv_dtype == "fp8"
                worst = max(rows.worst, Provenance.MEASURED if own else Provenance.CALIBRATED)
                if worst > Provenance.MEASURED:
                    self._policy.fall_back(f"attention.{phase}", self._tables.label(kind), f"kv_cache_dtype={self._model.kv_dtype}", worst)
                found = _Core(grid, 1.0, worst, _pair_seconds(grid) if phase == "prefill" else 0.0)
        self._cores[key] = found
        return found

    def _fp8_gain(self) -> float:
        """Return what scores of long prompts take in BF16 over FP8; kernels compute them in FP8 where the cache is FP8, as that of the block's table is."""
        names = ("num_heads", "num_key_value_heads", "head_dim", "window_size", "batch_size", "isl")
        known: list[dict[tuple[int, ...], float]] = []
        for dtype in ("bfloat16", "fp8"):
            rows = self._tables.rows("attn_context", *names, "latency_s", where={"kv_cache_dtype": dtype, "attn_dtype": dtype, "window_size": 0})
            if rows is None:
                return 1.0
            long = (rows["num_heads"] >= MANY) & (rows["num_heads"] == rows["num_key_value_heads"]) & (rows["isl"] >= LONG)
            known.append(dict(zip(zip(*(rows[name][long].tolist() for name in names), strict=True), rows["latency_s"][long].tolist(), strict=True)))
        ratios = [seconds / known[1][key] for key, seconds in known[0].items() if key in known[1]]
        return max(float(np.median(ratios)), 1.0) if ratios else 1.0

    def mla_core(self, batch: np.ndarray, kv_length: np.ndarray, *, heads: int) -> Timing:
        """Return the time of MLA's absorbed decode kernel alone, one new token per sequence."""
        width = (self._model.attention.kv_lora_rank or 0) + (self._model.attention.qk_rope_head_dim or 0)
        return self._mla_decode(batch, batch, kv_length, batch * kv_length * width * self._kv_bytes, heads)

    def _mla_decode(self, batch: np.ndarray, tokens: np.ndarray, kv_length: np.ndarray, read: np.ndarray, heads: int) -> Timing:
        attention = self._model.attention
        lora, rope = attention.kv_lora_rank or 0, attention.qk_rope_head_dim or 0
        key = ("mla_decode", heads)
        if key not in self._cores:
            self._cores[key] = None
            if (lora, rope) == (512, 64):
                cache = "fp8" if self._model.kv_dtype == "fp8" else "bfloat16"
                rows = self._tables.rows("mla_generation", "batch_size", "step", "latency_s", where={"num_heads": heads, "kv_cache_dtype": cache})
                if rows is not None:
                    grid = _build_grid(rows["batch_size"], rows["step"] + 1, rows["latency_s"], "decode", None)
                    self._cores[key] = _Core(grid, 1.0, rows.worst, 0.0)
                    if rows.worst > Provenance.CALIBRATED:
                        self._policy.fall_back("attention.decode", self._tables.label("mla_generation"), f"num_heads={heads}", rows.worst)
        found = self._cores[key]
        if found is not None:
            return found.grid(tokens, kv_length).scaled(1.0, found.worst)
        missing = f"num_heads={heads}, kv_lora_rank={lora}, qk_rope_head_dim={rope}"
        self._policy.fall_back("attention.decode", self._tables.label("mla_generation"), missing, Provenance.ROOFLINE)
        flops = 2.0 * tokens * kv_length * heads * (2 * lora + rope)
        return self._roofline.kernel(flops, read + 2.0 * tokens * heads * (2 * lora + rope), self._model.dtype)


def _over_prefix(rows: Mapping[str, np.ndarray], mine: np.ndarray) -> Grid | None:
    alone = mine & (rows["batch_size"] == 1)
    if "isl" not in rows or not (rows["prefix"][alone] > 0).any():
        return None
    return Grid.build(rows["isl"][alone], rows["prefix"][alone], rows["latency_s"][alone])


def _build_grid(batch: np.ndarray, length: np.ndarray, seconds: np.ndarray, phase: str, offset: float | None) -> Grid:
    work = identity if phase == "decode" or offset is None else quadratic(offset)
    return Grid.build(batch, length, seconds, column_work=work)


def _pair_seconds(grid: Grid) -> float:
    """Return the time per causal pair: the part of T(1, 2L) that two runs of L do not explain, per L² extra pairs."""
    measured = np.flatnonzero(grid.measured[0])
    lengths = {float(grid.columns[j]): float(grid.seconds[0, j]) for j in measured}
    for length in sorted(lengths, reverse=True):
        if length / 2 in lengths:
            return max(lengths[length] - 2.0 * lengths[length / 2], 0.0) / (length / 2) ** 2
    return 0.0
