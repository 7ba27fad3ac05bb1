"""Time of a rank's routed experts from its tokens per slot: grouped GEMM with a cost per activated expert and per tile of tokens.

    seconds = anchor · (first(A) + Σ over slots of extra(m_c))         A: slots with tokens, m_c: tokens of slot c

`first(A)` is the table's time with one token on each of A experts (weights are read once per activated expert), `extra(m)` what m tokens cost an
expert beyond the first, linear in tile-rounded m. Both are read from balanced rows. Slots enter as a sum because tiles of all experts share the SMs.
`anchor` is the table over the same formula for the balanced load of equal size, so a balanced grid point is reproduced exactly.
High-throughput exchanges bring one row per token, which kernels copy to each of its experts and sum afterwards: a cost per row, beside that per choice.
Shapes: R ranks, C slots of a rank (padded). A shape that no row has is scaled from the nearest by hidden·ffn, to which bytes and FLOPs are proportional.
"""

from __future__ import annotations

from dataclasses import replace
from math import log2

import numpy as np

from moesim.costs import masked_rows
from moesim.costs.expert_kernels import with_fixed
from moesim.costs.expert_rows import Balanced, by_slots, grouped_rows, row_seconds
from moesim.costs.expert_tiles import Load, OlderDevice, balanced_grid
from moesim.costs.gemm import Gemm
from moesim.costs.interpolation import Curve, Work, identity, tiles
from moesim.costs.provenance import Policy, Provenance, Timing
from moesim.costs.roofline import Roofline
from moesim.costs.tables import MOE_DTYPES, Rows, Tables
from moesim.model.moe_model import DTYPE_BYTES, MoEModel

TILE = 64.0
MAX_TABLE = 1 << 16
"""Tokens per expert up to which `extra` is tabulated; longer ones are computed."""
GROUPED = ("hidden_size", "inter_size", "slots", "active", "assignments", "latency_s")
SPLITS = 1.25
"""Largest time of the rows of a rank among many, at their most tokens, over its share of what one rank takes for all."""
TILED: Work = tiles((np.inf, TILE))


class ExpertLaw:
    """The fitted cost of one expert shape."""

    def __init__(
        self, rows: list[Balanced], *, scale: float, worst: Provenance, work: Work = TILED, by_active: bool = False, each_s: float = 0.0, row_s: float = 0.0
    ) -> None:
        """Fit the curves to balanced rows, in order of their number of slots.

        by_active: the rows count activated experts, not slots. each_s: seconds per assignment of what the rows leave out (activation between the products).
        row_s: seconds per token that reaches the rank, however many of its experts lie there.
        """
        self.scale = scale
        self.row_s = row_s
        self.ranks = max(item.ranks for item in rows)
        self.worst = worst
        self._work = work
        self._by_active = by_active
        self._each_s = each_s
        self._slots = np.array([item.slots for item in rows], dtype=np.float64)
        self._first = self._fit_first(rows)
        self._extra = self._fit_extra(rows)
        self._table = np.zeros(1)
        self._anchors = [(item, item.seconds / self._formula(item.slots, item.assignments)) for item in rows]

    # --- the two curves ---------------------------------------------------------------------------------------

    @staticmethod
    def _fit_first(rows: list[Balanced]) -> tuple[np.ndarray, np.ndarray]:
        points: dict[float, float] = {}
        for item in rows:
            full = int(np.searchsorted(item.assignments, item.slots))
            points[float(item.slots)] = float(item.seconds[min(full, len(item.seconds) - 1)])
        if len(rows) == 1:
            # One number of slots only: fewer tokens than slots activate one expert per assignment.
            few = rows[0].assignments < rows[0].slots
            points.update(zip(rows[0].assignments[few].tolist(), rows[0].seconds[few].tolist(), strict=True))
        active = np.array(sorted(points))
        seconds = np.array([points[key] for key in active.tolist()])
        slope = (seconds[1] - seconds[0]) / (active[1] - active[0]) if len(active) > 1 else seconds[0] / active[0]
        start = float(np.clip(seconds[0] - slope * active[0], 0.0, seconds[0]))
        return np.concatenate([[0.0], active]), np.concatenate([[start], seconds])

    def _fit_extra(self, rows: list[Balanced]) -> Curve:
        points: dict[float, tuple[int, float]] = {}
        for item in rows:
            start = float(self._first_seconds(np.array(float(item.slots))))
            for total, seconds in zip(item.assignments.tolist(), item.seconds.tolist(), strict=True):
                per_slot = total / item.slots
                # The largest rank speaks: few slots leave SMs idle.
                if per_slot >= 1 and (per_slot not in points or points[per_slot][0] < item.slots):
                    points[per_slot] = (item.slots, max((seconds - start) / item.slots, 0.0))
        keys = np.array(sorted(points))
        extra = np.maximum.accumulate(np.array([points[key][1] for key in keys.tolist()]))
        return Curve(keys, extra, self._work)

    def _first_seconds(self, active: np.ndarray) -> np.ndarray:
        keys, seconds = self._first
        slope = (seconds[-1] - seconds[-2]) / (keys[-1] - keys[-2])
        return np.interp(active, keys, seconds) + np.maximum(active - keys[-1], 0.0) * slope

    def _extra_seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Return the cost of tokens beyond the first; past the last key at the reached FLOP/s, weights' reading included."""
        last = float(self._extra.keys[-1])
        inner = self._extra(np.minimum(tokens, last)).seconds
        per_expert = float(self._extra.seconds[-1]) + self._unit
        return inner + np.where(tokens > last, per_expert * (self._work(tokens) / self._work(np.array(last)) - 1.0), 0.0)

    @property
    def _unit(self) -> float:
        keys, seconds = self._first
        return float((seconds[-1] - seconds[0]) / keys[-1])

    @property
    def launch_s(self) -> float:
        """Seconds of the operator that depend on no expert."""
        return float(self._first[1][0])

    def _formula(self, slots: float | np.ndarray, assignments: np.ndarray) -> np.ndarray:
        """Return the formula at the balanced load: every slot has the quotient, some one more."""
        quotient = np.floor(assignments / slots)
        more = assignments - quotient * slots
        active = np.minimum(assignments, slots)
        body = more * self._extra_seconds(quotient + 1.0) + (slots - more) * self._extra_seconds(np.maximum(quotient, 1.0))
        return self._first_seconds(active) + np.where(quotient > 0, body, 0.0)

    # --- evaluation -------------------------------------------------------------------------------------------

    def __call__(self, tokens: np.ndarray, present: np.ndarray | None) -> Timing:
        """Return the time of every rank; tokens [..., C], present bool [..., C] or None."""
        whole = tokens if tokens.dtype.kind in "iu" else np.ceil(tokens).astype(np.int64)
        slots = np.array(tokens.shape[-1]) if present is None else present.sum(axis=-1)
        if present is not None:
            whole = np.where(present, whole, 0)
        # A matrix product sums the short last axis several times faster than a reduction.
        ones = np.ones(whole.shape[-1])
        peak = int(whole.max(initial=0))
        if peak <= MAX_TABLE:
            extra = self._lookup(peak)[whole] @ ones
        else:
            extra = np.where(whole > 0, self._extra_seconds(np.maximum(whole, 1).astype(np.float64)), 0.0) @ ones
        load = whole.astype(np.float64)
        active, assignments = (whole > 0).astype(np.float64) @ ones, load @ ones
        start = (self._first_seconds(active) - self.launch_s) * self.scale + self.launch_s
        if self._by_active:
            slots = active
        anchor, on_key, inside = self._anchor(slots, assignments)
        seconds = anchor * (start + extra * self.scale) + assignments * self._each_s
        codes = np.full(seconds.shape, Provenance.CALIBRATED, dtype=np.uint8)
        if self.worst < Provenance.CALIBRATED and inside.any():
            # Loads that differ by at most 1 have the least sum of squares that their total allows.
            low = np.floor(assignments / np.maximum(slots, 1))
            least = assignments * (2.0 * low + 1.0) - slots * low * (low + 1.0)
            even = inside & (np.einsum("...c,...c->...", load, load) <= least)
            codes = np.where(even, np.where(on_key, np.uint8(Provenance.MEASURED), np.uint8(Provenance.INTERPOLATED)), codes)
        idle = assignments == 0
        return Timing(seconds=np.where(idle, 0.0, seconds), provenance=np.where(idle, np.uint8(0), np.maximum(codes, np.uint8(self.worst))))

    def _lookup(self, peak: int) -> np.ndarray:
        if len(self._table) <= peak:
            size = max(2 * len(self._table), peak + 1, 1024)
            table = np.concatenate([[0.0], self._extra_seconds(np.arange(1.0, size))])
            self._table = table
        return self._table

    def _anchor(self, slots: np.ndarray, assignments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return table over formula at the balanced load (between two numbers of slots: in log slots), whether it is a grid key, whether inside the grid."""
        slots = np.broadcast_to(slots, assignments.shape) if slots.ndim else slots
        anchor = np.ones(assignments.shape)
        on_key, inside = np.zeros(assignments.shape, dtype=bool), np.zeros(assignments.shape, dtype=bool)
        known = self._slots
        for count in np.unique(slots).tolist():
            if count < 1:
                continue
            mine = slots == count if slots.ndim else np.ones(assignments.shape, dtype=bool)
            load = assignments[mine]
            high = int(np.clip(np.searchsorted(known, count), 0, len(known) - 1))
            low = high if known[high] <= count or high == 0 else high - 1
            weight = 0.0 if low == high else float(np.log2(count / known[low]) / np.log2(known[high] / known[low]))
            anchor[mine] = 0.0
            for index, share in {low: 1.0 - weight, high: weight}.items() if low != high else ((low, 1.0),):
                item, ratio = self._anchors[index]
                anchor[mine] += share * np.interp(load * (item.slots / count), item.assignments, ratio)
            item = self._anchors[low][0]
            if item.slots == count:
                on_key[mine] = np.isin(load, item.assignments)
                inside[mine] = (load >= item.assignments[0]) & (load <= item.assignments[-1])
        return anchor, on_key, inside


class ExpertCost:
    """Times of the routed experts of one model on one device."""

    def __init__(self, model: MoEModel, tables: Tables, roofline: Roofline, policy: Policy, kernel: str = "") -> None:
        """kernel: part of the name of the kernels that an engine was told to run, where it was; rows of others are then left aside."""
        self._model, self._tables, self._roofline, self._policy, self._kernel = model, tables, roofline, policy, kernel
        self._laws: dict[tuple[int, int, bool], ExpertLaw] = {}

    def law(self, expert_tp: int, slots: int = 0, *, sorts: bool = False) -> ExpertLaw:
        """Return the fitted law for experts split over `expert_tp` ranks; sorts: with the kernels that copy rows to experts and sum what these return.

        slots: of a rank, 0 for all experts; rows that were measured as one of so many ranks speak first.
        """
        key = expert_tp, slots or self._model.num_experts, sorts
        if key not in self._laws:
            self._laws[key] = self._build(*key)
        return self._laws[key]

    def masked_seconds(self, tokens: np.ndarray, ranks: int, expert_tp: int) -> np.ndarray:
        """Return what choices of other ranks' experts add, `tokens` [n] of all `ranks`; 0 with kernels that skip them and rows that were measured so."""
        model, slots = self._model, -(-self._model.num_experts // ranks)
        if self._tables.engine != masked_rows.ENGINE or model.expert_dtype not in masked_rows.DTYPES or self.law(expert_tp, slots).ranks > 1:
            return np.zeros(len(tokens))
        rows, width = tokens * float(model.top_k), model.expert_ffn_size / expert_tp
        moved = masked_rows.moved_bytes(
            rows, rows * (1 - 1 / ranks), hidden=model.hidden_size, width=width, gated=model.gated_ffn, element=DTYPE_BYTES[model.expert_dtype],
            cache=self._roofline.l2_bytes,
        )  # fmt: skip
        return np.asarray(moved / self._roofline.reached_Bps)

    def _build(self, expert_tp: int, slots: int, sorts: bool) -> ExpertLaw:
        model = self._model
        dtype = MOE_DTYPES.get(model.expert_dtype)
        missing = f"moe_dtype={dtype or model.expert_dtype}, hidden_size={model.hidden_size}, inter_size={model.expert_ffn_size}, moe_tp_size={expert_tp}"
        if dtype is not None:
            law = self._grouped(dtype, expert_tp, sorts, missing)
            if law is None and sorts and expert_tp == 1:
                law = self._sorting(dtype, missing)
            if law is not None:
                return law
            rows, worst = self._expert_parallel_rows(dtype) if expert_tp == 1 else ([], Provenance.MEASURED)
            if rows:
                if worst > Provenance.CALIBRATED:
                    self._policy.fall_back("experts", self._tables.label("wideep_moe_generation"), missing, worst)
                return ExpertLaw(rows, scale=1.0, worst=worst)
            found = self._older(dtype, expert_tp, slots) or self._nearest(dtype, expert_tp, slots)
            if found is not None:
                item, scale, worst = found
                if worst > Provenance.MEASURED:
                    self._policy.fall_back("experts", self._tables.label("moe"), missing, worst)
                return ExpertLaw([item], scale=scale, worst=worst)
        self._policy.fall_back("experts", self._tables.label("moe"), missing, Provenance.ROOFLINE)
        return self._roofline_law(expert_tp)

    def _grouped(self, dtype: str, expert_tp: int, sorts: bool, missing: str) -> ExpertLaw | None:
        """Return the law of the device's own grouped products; of the nearest shape, in proportion to hidden·ffn, where it lacks this one."""
        rows = self._tables.rows("grouped_gemm", *GROUPED, where={"moe_dtype": dtype}, transfer=False)
        if rows is None or self._tables.own("moe"):
            return None
        model = self._model
        width = model.expert_ffn_size / expert_tp
        distance = np.abs(np.log2(rows["hidden_size"] / model.hidden_size)) + np.abs(np.log2(rows["inter_size"] / width))
        best = int(np.argmin(distance))
        mine = (rows["hidden_size"] == rows["hidden_size"][best]) & (rows["inter_size"] == rows["inter_size"][best])
        worst = Provenance.MEASURED if distance[best] == 0 and model.gated_ffn else Provenance.CALIBRATED
        if worst > Provenance.MEASURED:
            self._policy.fall_back("experts", self._tables.label("grouped_gemm"), missing, worst)
        scale = model.hidden_size * width / float(rows["hidden_size"][best] * rows["inter_size"][best]) * (1.0 if model.gated_ffn else 2 / 3)
        each = row = 0.0
        if (self._tables.stem("grouped_gemm") or "").endswith("_infersim"):
            # InferSim times the two products alone; the activation between them reads two halves and writes one.
            each = 6.0 * width
            if sorts:
                # The row is read and written for every expert, its quantised activation likewise, the expert's result read; the sum is written.
                hidden, bits = model.hidden_size, DTYPE_BYTES.get(model.expert_dtype, 2.0)
                each += 2.0 * bits * hidden + (2.0 + bits) * width * (bits < 2) + 2.0 * hidden
                row = 2.0 * hidden
        reached, work = self._roofline.reached_Bps, identity if self._roofline.is_cpu else TILED
        balanced = grouped_rows(rows, mine)
        return ExpertLaw(balanced, scale=scale, worst=worst, work=work, by_active=True, each_s=each / reached, row_s=row / reached)

    def _sorting(self, dtype: str, missing: str) -> ExpertLaw | None:
        """Return the law of rows measured with the copies and sums around the products, as high-throughput exchanges need them."""
        if self._tables.prefers("moe") and not self._tables.prefers("wideep_moe_context"):
            return None
        rows = self._wide_rows("wideep_moe_context", dtype)
        if rows is None:
            return None
        row_s = row_seconds(rows)
        without = rows["latency_s"] - row_s * rows["num_tokens"]
        worst = max(rows.worst, Provenance.CALIBRATED)
        if worst > Provenance.CALIBRATED:
            self._policy.fall_back("experts", self._tables.label("wideep_moe_context"), missing, worst)
        return ExpertLaw(by_slots(rows, without), scale=1.0, worst=worst, row_s=row_s)

    def _expert_parallel_rows(self, dtype: str) -> tuple[list[Balanced], Provenance]:
        """Return the rows measured under expert parallelism: num_tokens counts all ranks, uniform routing."""
        if self._tables.prefers("moe") and not self._tables.prefers("wideep_moe_generation"):
            return [], Provenance.MEASURED  # another engine's kernels; the wanted one has its own one-rank rows
        rows = self._wide_rows("wideep_moe_generation", dtype)
        return ([], Provenance.MEASURED) if rows is None else (by_slots(rows, rows["latency_s"]), rows.worst)

    def _wide_rows(self, kind: str, dtype: str) -> Rows | None:
        model = self._model
        where = {"moe_dtype": dtype, "hidden_size": model.hidden_size, "inter_size": model.expert_ffn_size, "moe_tp_size": 1, "distribution": "uniform"}
        return self._tables.rows(kind, "num_tokens", "topk", "num_experts", "moe_ep_size", "latency_s", where=where)

    def _older(self, dtype: str, expert_tp: int, slots: int) -> tuple[Balanced, float, Provenance] | None:
        """Return what default tiles take on a device of an older generation than its donor; `slots` of a rank."""
        model = self._model
        if dtype != "bfloat16" or not model.gated_ffn or self._tables.own("moe"):
            return None
        assignments = balanced_grid(slots, model.top_k)
        tokens = assignments * model.num_experts / (slots * max(model.top_k, 1))
        load = Load(hidden=model.hidden_size, width=model.expert_ffn_size / expert_tp, experts=slots, tokens=tokens, assignments=assignments)
        product = Gemm(self._tables, self._roofline, self._policy)
        seconds = OlderDevice(self._tables.cluster, self._tables, product).seconds(load)
        return None if seconds is None else (Balanced.build(slots, assignments, seconds), 1.0, Provenance.EXTRAPOLATED)

    def _nearest(self, dtype: str, expert_tp: int, slots: int) -> tuple[Balanced, float, Provenance] | None:
        """Return balanced one-rank rows of the nearest shape, the factor to this model's shape, and the class."""
        model = self._model
        names = ("hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size")
        where = {"moe_dtype": dtype, "moe_ep_size": 1, "distribution": "balanced"}
        rows = self._tables.rows("moe", *names, "kernel_source", "num_tokens", "latency_s", where=where)
        if rows is None:
            return None
        shapes = np.stack([rows[name] for name in names], axis=1)
        known, first, inverse = np.unique(shapes, axis=0, return_index=True, return_inverse=True)
        sources, source = np.unique(rows["kernel_source"].astype(str), return_inverse=True)
        usual = int(np.bincount(source.ravel(), minlength=len(sources)).argmax())
        told = np.array([self._kernel in one for one in sources]) & bool(self._kernel)
        wanted = np.array([model.hidden_size, model.expert_ffn_size, model.num_experts, model.top_k, expert_tp])
        distance = (
            4 * np.abs(np.log2(known[:, 0] / wanted[0]))
            + 4 * np.abs(np.log2(known[:, 1] / known[:, 4] / (wanted[1] / expert_tp)))
            + np.abs(np.log2(known[:, 2] / wanted[2]))
            + np.abs(np.log2(known[:, 3] / wanted[3]))
            + 0.1 * (known[:, 4] != expert_tp)
        )
        # Another kernel of the same dtype serves other kinds of experts (without gates); it is used for its own shapes only, or where it is known to run.
        ran = source.ravel()[first]
        distance = distance + (64.0 * ~told[ran] if told.any() else 16.0 * (ran != usual) * (distance > 0))
        for index in np.argsort(distance, kind="stable").tolist():
            mine = inverse.ravel() == index
            hidden, ffn, experts, topk, split = (int(value) for value in known[index])
            item = Balanced.build(experts, rows["num_tokens"][mine] * float(topk), rows["latency_s"][mine])
            if self._reads_too_fast(item, hidden * ffn / split):
                continue
            item = self._of_ranks(item, dict(zip(names, known[index].tolist(), strict=True)), dtype, model.num_experts / slots)
            exact = bool((known[index] == wanted).all()) and model.gated_ffn
            worst = max(rows.worst, Provenance.MEASURED if exact else Provenance.CALIBRATED)
            scale = model.hidden_size * model.expert_ffn_size / expert_tp / (hidden * ffn / split) * (1.0 if model.gated_ffn else 2 / 3)
            if told[ran[index]]:
                item = replace(item, seconds=with_fixed(item.seconds, scale, self._tables, dtype, self._kernel, experts, model.num_experts))
            return item, scale, worst
        return None

    def _of_ranks(self, alone: Balanced, shape: dict[str, int], dtype: str, ranks: float) -> Balanced:
        """Return the rows of a rank among the nearest number of `ranks`, where a table has them and their time falls with its share (some do not)."""
        rows = self._tables.rows("moe", "moe_ep_size", "num_tokens", "latency_s", where={"moe_dtype": dtype, "distribution": "balanced", **shape})
        if rows is None or ranks <= 1:
            return alone
        found, best = alone, log2(ranks)
        for count in np.unique(rows["moe_ep_size"]).tolist():
            mine = (rows["moe_ep_size"] == count) & (rows["num_tokens"] * shape["topk"] >= count)
            if count == 1 or shape["num_experts"] % count or not mine.any() or abs(log2(ranks / count)) >= best:
                continue
            item = Balanced.build(shape["num_experts"] // count, rows["num_tokens"][mine] * (shape["topk"] / count), rows["latency_s"][mine], count)
            whole = float(np.interp(item.assignments[-1] * count, alone.assignments, alone.seconds))
            found, best = (item, abs(log2(ranks / count))) if item.seconds[-1] * count <= SPLITS * whole else (found, best)
        return found

    def _reads_too_fast(self, item: Balanced, elements: float) -> bool:
        """Return whether rows claim more weight traffic than the memory has: their routing was not balanced (group-limited gates)."""
        full = min(int(np.searchsorted(item.assignments, item.slots)), len(item.seconds) - 1)
        read = item.slots * 3.0 * elements * DTYPE_BYTES.get(self._model.expert_dtype, 2.0)
        return bool(read / item.seconds[full] > self._roofline.memory_Bps)

    def _roofline_law(self, expert_tp: int) -> ExpertLaw:
        model = self._model
        width = model.expert_ffn_size / expert_tp
        weights = (3.0 if model.gated_ffn else 2.0) * model.hidden_size * width
        per_token = 2.0 * (2.0 * model.hidden_size + 3.0 * width)
        slots = max(model.num_experts, 1)
        tokens = np.concatenate([[1.0 / slots] if slots > 1 else [], [1.0], TILE * 2.0 ** np.arange(0, 11)])
        per_expert = np.maximum(tokens, 1.0)
        rate = self._roofline.flops("bfloat16" if model.expert_dtype in ("mxfp4", "int4") else model.expert_dtype)
        moved = weights * DTYPE_BYTES.get(model.expert_dtype, 2.0) + per_expert * per_token
        each = np.maximum(2.0 * weights * per_expert / rate, moved / self._roofline.declared_Bps)
        seconds = 2.0 * self._roofline.declared_launch_s + np.minimum(tokens * slots, slots) * each
        work = identity if self._roofline.is_cpu else TILED
        return ExpertLaw([Balanced(slots, slots * tokens, seconds)], scale=1.0, worst=Provenance.ROOFLINE, work=work)
