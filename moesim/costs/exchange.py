"""Dispatch and combine: the link model on the bytes of every port, calibrated so that balanced traffic takes the measured time.

    t_r = ‖scale-up bytes / rate, scale-out bytes / rate‖ of rank r, out and in apart      n*_r = t_r / (t of one balanced token of the table)
    time_r = table(n*_r)

n* is the number of balanced tokens that would load the rank's ports as much. The norm is the larger of both in low latency; in high throughput, where
the same SMs feed the NIC and forward over the scale-up link, so that the two overlap in part, the root of the sum of squares. Low-latency messages
travel without SMs: of their time, kernels before and after take the SMs, and whatever computes meanwhile waits for those. The rates are the steepest
of the tables at large sizes. A number of nodes that no table has takes the scale-out rate that any of them reaches in either direction, the curve
of the table that reaches most at its largest size, and the least time between its neighbours'. Times are those of the transfer kernels; the
notification that precedes high-throughput dispatch between nodes is a synchronisation and is left out. Without a table: latency + bytes /
(bandwidth · declared efficiency).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2, sqrt

import numpy as np

from moesim.costs.interpolation import Curve
from moesim.costs.links import LinkModel
from moesim.costs.provenance import Policy, Provenance, Timing
from moesim.costs.tables import Tables
from moesim.costs.traffic import Ports, balanced_counts, devices_per_node, ports
from moesim.errors import CostError, describe
from moesim.model.moe_model import DTYPE_BYTES, MoEModel

STAGES = ("dispatch", "combine")
FP8_BLOCK = 128
COMMUNICATION_SMS = 20
TABLE_DEVICES = 8
GROUP_LIMIT = 4
"""Nodes a token may reach in the high-throughput tables: over 8 nodes only this keeps the table's combine below the NIC's bandwidth."""
ROUNDING = 1e-9
EVEN = 0.1
"""Loads within this share of their mean count as the table's own (random, balanced) distribution."""
SEND_S, SEND_S_PER_BYTE = 13.3e-6, 1.58e-12
"""The kernel that packs and issues low-latency messages, by the bytes of the messages. Source: DeepEP pull request 500 and its authors' report (H20, EP 16,
dispatch of 8-128 tokens: 13.5, 16.3, 14.6, 18.1, 19.9, 25.1 us); it gives 36.5 us for a combine of 128 tokens, pull request 425 measured 38-42 us."""
RECEIVE_S = 5.0e-6
"""The kernel that unpacks them, beside reading and writing them in memory. Source: as above (5.4-10.6 us); combine of 128 tokens: 10.5, measured 10.2 us."""
_TABLES = {"normal": "normal", "low_latency": "ll"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeTiming:
    """Times of one all-to-all: a rank ends at max(own ready + send_s, ready of every source that sends to it + recv_s)."""

    send_s: np.ndarray
    """float64 [..., R]."""
    recv_s: np.ndarray
    """float64 [..., R]."""
    provenance: np.ndarray
    """uint8 [..., R]."""
    bytes: dict[str, np.ndarray] = field(default_factory=dict)
    """`local`, `intra_node` (scale-up link), `inter_node` (scale-out link): bytes over all ranks, [...]."""
    port_bytes: dict[str, np.ndarray] = field(default_factory=dict)
    """`intra_out`, `intra_in`, `inter_out`, `inter_in`: bytes of every rank's ports, [..., R]."""
    send_kernel_s: np.ndarray | None = None
    """The part of both times in which the SMs pack and issue the messages, [..., R]; None where no kernel can leave while they travel."""
    receive_kernel_s: np.ndarray | None = None
    """The part in which the SMs unpack, or reduce, what has come."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """One table: time against tokens per rank for a number of nodes, and the load that one token puts on the ports."""

    curve: Curve
    up: float
    """Bytes per token over the scale-up port."""
    out: float
    shape: tuple[int, int, int, int, int]
    """hidden, top-k, experts, nodes, devices per node."""
    worst: Provenance
    """Best class of a time read from the table."""

    @property
    def slope(self) -> float:
        """Least seconds per token between the smallest size and the larger ones: some tables end in a congested network.

        That of the largest size alone where there is no other, or noise has it that larger sizes took no longer.
        """
        keys, seconds = self.curve.keys, self.curve.seconds
        large = slice(max(len(keys) // 2, 1), None)
        least = float(((seconds[large] - seconds[0]) / (keys[large] - keys[0])).min(initial=np.inf))
        return least if 0 < least < np.inf else self.last

    @property
    def last(self) -> float:
        """Seconds per token at the largest size."""
        return float(self.curve.seconds[-1] / self.curve.keys[-1])


class ExchangeCost:
    """Times of dispatch and combine for one model on one cluster."""

    def __init__(self, model: MoEModel, devices: int, tables: Tables, links: LinkModel, policy: Policy, memory_Bps: float = np.inf) -> None:
        """memory_Bps: what kernels reach of the device's memory."""
        self._model = model
        self._memory_Bps = memory_Bps
        self._devices = devices
        self._tables = tables
        self._links = links
        self._policy = policy
        self._references: dict[tuple[str, str], dict[int, _Reference]] = {}

    def payload_bytes(self, stage: str) -> float:
        """Return the bytes of one token's copy: FP8 with one float32 scale per 128 values in dispatch of FP8 models, else the model's dtype."""
        hidden = self._model.hidden_size
        if stage == "dispatch" and self._model.expert_dtype == "fp8":
            return hidden + 4.0 * -(-hidden // FP8_BLOCK)
        return hidden * DTYPE_BYTES.get(self._model.dtype, 2.0)

    def __call__(
        self,
        algorithm: str,
        stage: str,
        *,
        assign_RR: np.ndarray | None,
        copy_RR: np.ndarray | None,
        node_RN: np.ndarray | None,
        copies: Ports | None = None,
    ) -> ExchangeTiming:
        """Return times and bytes; see `CostModel.exchange`."""
        if stage not in STAGES:
            raise CostError(describe("exchange", "stage", stage, f"must be one of {', '.join(STAGES)}"))
        if copies is None:
            copies = self.copies(algorithm, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN)
        num_ranks = copies.local.shape[-1]
        devices = devices_per_node(num_ranks, self._devices)
        if stage == "combine":
            copies = copies.reversed()
        size = self.payload_bytes(stage)
        moved = Ports(copies.up_out * size, copies.up_in * size, copies.out_out * size, copies.out_in * size, copies.local * size)
        nodes = num_ranks // devices
        if num_ranks == 1:
            nothing = np.zeros(moved.local.shape)
            sent = received = Timing(seconds=nothing, provenance=np.zeros(nothing.shape, dtype=np.uint8))
        elif algorithm in _TABLES and self._reference(algorithm, stage):
            sent = self._from_tables(algorithm, stage, moved.up_out, moved.out_out, nodes, devices)
            received = self._from_tables(algorithm, stage, moved.up_in, moved.out_in, nodes, devices)
        else:
            if algorithm in _TABLES:
                table = self._tables.label(f"deepep_{_TABLES[algorithm]}_1to8nodes")
                self._policy.fall_back(f"exchange.{stage}", table, f"algorithm={algorithm}, node_num={nodes}", Provenance.ROOFLINE)
            both = algorithm == "2dh"
            sent = self._links.all_to_all(moved.up_out, moved.out_out, ranks=num_ranks, devices=devices, one_after_the_other=both)
            received = self._links.all_to_all(moved.up_in, moved.out_in, ranks=num_ranks, devices=devices, one_after_the_other=both)
        kernels = self._kernels(stage, moved, np.minimum(sent.seconds, received.seconds)) if algorithm == "low_latency" and num_ranks > 1 else (None, None)
        return ExchangeTiming(
            send_s=sent.seconds,
            recv_s=received.seconds,
            provenance=np.maximum(sent.provenance, received.provenance),
            bytes={"local": moved.local.sum(axis=-1), "intra_node": moved.up_out.sum(axis=-1), "inter_node": moved.out_out.sum(axis=-1)},
            port_bytes={"intra_out": moved.up_out, "intra_in": moved.up_in, "inter_out": moved.out_out, "inter_in": moved.out_in},
            send_kernel_s=kernels[0],
            receive_kernel_s=kernels[1],
        )

    def _kernels(self, stage: str, moved: Ports, most_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the time of the kernels before and after the messages travel, together at most `most_s`."""
        out, into = moved.up_out + moved.out_out + moved.local, moved.up_in + moved.out_in + moved.local
        # Dispatch copies every message that came; combine reads one per choice and writes one sum.
        touched = into * (2.0 if stage == "dispatch" else 1.0 + 1.0 / max(self._model.top_k, 1))
        send = np.where(out > 0, SEND_S + SEND_S_PER_BYTE * out, 0.0)
        receive = np.where(into > 0, RECEIVE_S + touched / self._memory_Bps, 0.0)
        fits = np.minimum(1.0, most_s / np.maximum(send + receive, 1e-30))
        return send * fits, receive * fits

    def copies(self, algorithm: str, *, assign_RR: np.ndarray | None, copy_RR: np.ndarray | None, node_RN: np.ndarray | None) -> Ports:
        """Return the copies on every port in the direction of dispatch; dispatch and combine share them."""
        pairs = assign_RR if assign_RR is not None else copy_RR
        if pairs is None:
            raise CostError("exchange: assign_RR and copy_RR are missing; give the counts of tokens between ranks")
        devices = devices_per_node(np.asarray(pairs).shape[-1], self._devices)
        return ports(algorithm, devices, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN)

    # --- tables -----------------------------------------------------------------------------------------------

    def _from_tables(self, algorithm: str, stage: str, up: np.ndarray, out: np.ndarray, nodes: int, devices: int) -> Timing:
        references = self._reference(algorithm, stage)
        reference, out_rate, later_s = self._of_nodes(algorithm, stage, nodes)
        up_rate = self._up_rate(references)
        known = reference.shape[3] == nodes
        per_token = self._joined(algorithm, reference.up / up_rate, reference.out / out_rate) if known else reference.slope
        # tables were measured without oversubscription
        out_rate = min(out_rate, self._links.out_Bps(nodes))
        tokens = self._joined(algorithm, up / up_rate, out / out_rate) / per_token
        seconds = reference.curve.seconds_at(tokens) + later_s
        # One class per exchange: all its ranks wait for each other.
        own = reference.shape == (self._model.hidden_size, self._model.top_k, self._model.num_experts, nodes, devices)
        codes = self._classes(reference.curve, tokens) if own else np.full((*up.shape[:-1], 1), Provenance.CALIBRATED, dtype=np.uint8)
        codes = np.maximum(codes, np.uint8(reference.worst))
        if reference.worst > Provenance.CALIBRATED:
            table = self._tables.label(f"deepep_{_TABLES[algorithm]}_1to8nodes")
            self._policy.fall_back(f"exchange.{algorithm}", table, f"node_num={reference.shape[3]}", reference.worst)
        seconds[(up == 0) & (out == 0)] = 0.0
        return Timing(seconds=seconds, provenance=np.where(seconds > 0, codes, np.uint8(0)))

    @staticmethod
    def _joined(algorithm: str, up_s: np.ndarray | float, out_s: np.ndarray | float) -> np.ndarray:
        return np.hypot(up_s, out_s) if algorithm == "normal" else np.maximum(up_s, out_s)

    def _of_nodes(self, algorithm: str, stage: str, nodes: int) -> tuple[_Reference, float, float]:
        """Return the table to read, the bytes/s of the scale-out port, and seconds to add: those of the number of nodes, else what its neighbours say."""
        references = self._reference(algorithm, stage)
        known = sorted(references)
        if nodes in references:
            return references[nodes], self._out_rate(algorithm, stage, nodes), 0.0
        high = next((count for count in known if count >= nodes), known[-1])
        low = max((count for count in known if count <= nodes), default=high)
        between = [count for count in {low, high} if references[count].out > 0 or high == 1]
        # A NIC carries both directions of an exchange alike.
        reached = {count: max(self._out_rate(algorithm, one, count) for one in STAGES if count in self._reference(algorithm, one)) for count in between}
        best = max(between, key=lambda count: (references[count].out / references[count].last, -count))
        weight = 0.0 if low == high else log2(nodes / low) / log2(high / low)
        least = (1.0 - weight) * references[low].curve.seconds[0] + weight * references[high].curve.seconds[0]
        return references[best], max(reached.values()), float(least - references[best].curve.seconds[0])

    @staticmethod
    def _classes(curve: Curve, tokens: np.ndarray) -> np.ndarray:
        """Return the class of every exchange [..., 1] of the table's own shape: loads that are even are of its distribution."""
        mean, least, most = tokens.mean(axis=-1, keepdims=True), tokens.min(axis=-1, keepdims=True), tokens.max(axis=-1, keepdims=True)
        even = (most <= (1 + EVEN) * mean) & (least >= (1 - EVEN) * mean)
        keys = curve.keys
        near = keys[np.clip(np.searchsorted(keys, mean * (1 - ROUNDING)), 0, len(keys) - 1)]
        on_key = (np.abs(least - near) <= ROUNDING * near) & (np.abs(most - near) <= ROUNDING * near)
        codes = np.where(on_key, np.uint8(Provenance.MEASURED), np.uint8(Provenance.INTERPOLATED))
        outside = (least < keys[0] * (1 - ROUNDING)) | (most > keys[-1] * (1 + ROUNDING))
        return np.where(even & ~outside, codes, np.uint8(Provenance.CALIBRATED))

    @staticmethod
    def _up_rate(references: dict[int, _Reference]) -> float:
        """Return the bytes/s of the scale-up port: what the table of the fewest nodes reaches at large sizes."""
        first = references[min(references)]
        return first.up / first.slope

    def _out_rate(self, algorithm: str, stage: str, nodes: int) -> float:
        """Return the bytes/s of the scale-out port that the table of this number of nodes reaches, at most the link's bandwidth."""
        references = self._reference(algorithm, stage)
        reference, link = references[nodes], self._links.out_Bps(1)
        if reference.out == 0:
            return link
        seconds = reference.slope
        if algorithm == "normal":
            seconds = sqrt(max(seconds**2 - (reference.up / self._up_rate(references)) ** 2, 0.0))
        return min(reference.out / seconds, link) if seconds > 0 else link

    def _reference(self, algorithm: str, stage: str) -> dict[int, _Reference]:
        key = (algorithm, stage)
        if key not in self._references:
            self._references[key] = self._load(algorithm, stage)
        return self._references[key]

    def _load(self, algorithm: str, stage: str) -> dict[int, _Reference]:
        result: dict[int, _Reference] = {}
        for kind in (f"deepep_{_TABLES[algorithm]}_1to8nodes", f"deepep_{_TABLES[algorithm]}_1node"):
            for count, reference in self._load_kind(kind, algorithm, stage).items():
                mine = (self._model.hidden_size, self._model.top_k, self._model.num_experts)
                if count not in result or (reference.shape[:3] == mine and result[count].shape[:3] != mine):
                    result[count] = reference
        return result

    def _load_kind(self, kind: str, algorithm: str, stage: str) -> dict[int, _Reference]:
        latency = f"{stage}_transmit_s" if algorithm == "normal" else f"{stage}_avg_t_s"
        where = {f"{stage}_sms": COMMUNICATION_SMS} if algorithm == "normal" else {}
        rows = self._tables.rows(kind, "node_num", "hidden_size", "num_topk", "num_experts", "num_token", latency, where=where)
        if rows is None:
            return {}
        model = self._model
        # Nearest shape of every node count: the bytes of a token matter most, the experts (how copies spread) least.
        distance = (
            4 * np.abs(np.log2(rows["hidden_size"] / model.hidden_size))
            + 2 * np.abs(np.log2(rows["num_topk"] / max(model.top_k, 1)))
            + np.abs(np.log2(rows["num_experts"] / max(model.num_experts, 1)))
        )
        result = {}
        for nodes in np.unique(rows["node_num"]).tolist():
            at = np.flatnonzero(rows["node_num"] == nodes)
            best = at[int(np.argmin(distance[at]))]
            hidden, top_k, experts = (int(rows[name][best]) for name in ("hidden_size", "num_topk", "num_experts"))
            same = (rows["hidden_size"][at] == hidden) & (rows["num_topk"][at] == top_k) & (rows["num_experts"][at] == experts)
            order = at[same][np.argsort(rows["num_token"][at[same]], kind="stable")]
            keys, first = np.unique(rows["num_token"][order], return_index=True)
            if len(keys) < 2:
                continue
            curve = Curve(keys.astype(np.float64), rows[latency][order][first])
            result[int(nodes)] = self._describe(algorithm, stage, curve, (hidden, top_k, experts, int(nodes)), rows.worst)
        return result

    def _describe(self, algorithm: str, stage: str, curve: Curve, shape: tuple[int, int, int, int], worst: Provenance) -> _Reference:
        hidden, top_k, experts, nodes = shape
        limit = GROUP_LIMIT if algorithm == "normal" else None
        counts = balanced_counts(num_ranks=nodes * TABLE_DEVICES, devices=TABLE_DEVICES, num_experts=experts, top_k=top_k, max_nodes=limit)
        copies = ports(algorithm, TABLE_DEVICES, **counts)
        size = hidden + 4.0 * -(-hidden // FP8_BLOCK) if stage == "dispatch" else 2.0 * hidden
        return _Reference(curve, float(copies.up_out[0]) * size, float(copies.out_out[0]) * size, (*shape, TABLE_DEVICES), worst)
