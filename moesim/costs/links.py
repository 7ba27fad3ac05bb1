"""Collectives and transfers: NCCL's tables inside a node, a ring over the links otherwise.

Sizes are the bytes of the full buffer (all_reduce: the tensor; all_gather: the gathered result; reduce_scatter: the input). A group of N nodes × D
devices reduces and gathers inside the node and rings over the NICs in between, each device carrying 1/D of the buffer.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.interpolation import Curve, drop_spikes
from moesim.costs.provenance import Policy, Provenance, Timing, timing, total, zero_where
from moesim.costs.tables import Tables
from moesim.errors import CostError, describe
from moesim.hardware.cluster import Cluster, Link

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")
ENGINES = ("sglang", "trtllm", "vllm")
"""Serving engines; any other name asks for NCCL alone."""
OWN_LIMIT = {"trtllm": {4: 1e6, 8: 5e5}}
"""Engine → devices → bytes from which it leaves an all-reduce to NCCL although its own kernel is the faster one; none: it takes the faster one.

Source: TensorRT-LLM, cpp/tensorrt_llm/thop/allreduceOp.cpp, strategy AUTO (two devices always take its own kernel).
"""
NCCL_CALL_S = 6.6e-6
"""A call of NCCL beside its hops, where no table says it. Source: base latency of the ring with LL in NCCL's tuning model (src/graph/tuning.cc)."""
_RING_PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "alltoall": 1.0}


class LinkModel:
    """Transfer times over the links of one cluster."""

    def __init__(self, cluster: Cluster, tables: Tables, policy: Policy, engine: str) -> None:
        self._cluster = cluster
        self._tables = tables
        self._policy = policy
        self._engine = engine
        self._up = cluster.links.get("scale_up") or cluster.links.get("host")
        self._out = cluster.links.get("scale_out")
        self._curves: dict[tuple[str, int], tuple[Curve, float] | None] = {}
        self._direct: tuple[Curve, Provenance] | tuple[()] | None = None
        pair = self._curve("alltoall", 2)
        self._call_s = float(pair[0].seconds.min()) if pair is not None else NCCL_CALL_S if cluster.device.kind == "gpu" else 0.0
        """Seconds of a call that moves next to nothing: what every transfer without a table costs besides its link."""

    @staticmethod
    def _port_Bps(link: Link) -> float:
        return link.bandwidth_Bps / max(link.shared_by, 1)

    def out_Bps(self, nodes: int) -> float:
        """Return the bytes/s of a device's share of the scale-out link, one direction, in a group of so many nodes: where they need more than one leaf,
        all of it takes the uplinks' rate.
        """
        if self._out is None:
            return float("inf")
        return self._port_Bps(self._out) / (1.0 if nodes <= self._cluster.nodes_per_leaf else self._cluster.fabric_oversubscription)

    # --- collectives ------------------------------------------------------------------------------------------

    def collective(self, operation: str, nbytes: np.ndarray, ranks: int, nodes: int) -> Timing:
        """Return the time of a collective over `ranks` devices on `nodes` nodes."""
        if operation not in OPERATIONS:
            raise CostError(describe("collective", "operation", operation, f"must be one of {', '.join(OPERATIONS)}"))
        if nodes < 1 or ranks < 1 or ranks % nodes:
            raise CostError(describe(f"collective {operation}", "ranks", f"{ranks} on {nodes} nodes", "must be the same number on every node"))
        size = np.maximum(np.asarray(nbytes, dtype=np.float64), 0.0)
        if ranks == 1:
            return timing(np.zeros(size.shape), Provenance.MEASURED)
        inside = ranks // nodes
        if nodes == 1:
            timed = self._inside(operation, size, ranks)
        else:
            between = self._between(operation, size / inside, nodes)
            if inside == 1:
                timed = between
            elif operation == "all_reduce":
                timed = total(self._inside("reduce_scatter", size, inside), between, self._inside("all_gather", size, inside))
            else:
                timed = total(self._inside(operation, size, inside), between)
        return zero_where(timed, size <= 0)

    def _inside(self, operation: str, size: np.ndarray, ranks: int) -> Timing:
        found = self._curve(operation, ranks)
        if found is not None:
            curve, factor = found
            worst = self._class(operation)
            if factor == 1.0:
                timed = curve(size)
                return timed if worst is Provenance.MEASURED else timed.scaled(1.0, worst)
            return timing(curve(size * factor).seconds, max(worst, Provenance.CALIBRATED))
        self._policy.fall_back(operation, self._tables.label("nccl"), f"op_name={operation}, num_gpus={ranks}", Provenance.ROOFLINE)
        return self._called(self._ring(self._link("scale_up", self._up), operation, size, ranks, Provenance.ROOFLINE))

    def _between(self, operation: str, size: np.ndarray, nodes: int) -> Timing:
        # No table covers NCCL between nodes: with tables of this device the NIC model below is checked against DeepEP's, hence calibrated.
        calibrated = self._tables.stem("nccl") is not None and self._tables.stem("deepep_normal_1to8nodes") is not None
        if not calibrated:
            self._policy.fall_back(operation, self._tables.label("nccl"), f"op_name={operation}, nodes={nodes}", Provenance.ROOFLINE)
        code = Provenance.CALIBRATED if calibrated else Provenance.ROOFLINE
        return self._called(self._ring(self._link("scale_out", self._out), operation, size, nodes, code))

    def _called(self, ring: Timing) -> Timing:
        return Timing(seconds=ring.seconds + self._call_s, provenance=ring.provenance)

    def _ring(self, link: Link, operation: str, size: np.ndarray, members: int, code: Provenance) -> Timing:
        passes = _RING_PASSES[operation] * (members - 1)
        return timing(passes * link.latency_s + passes / members * size / self._reached(link, size / members, members), code)

    def _curve(self, operation: str, ranks: int) -> tuple[Curve, float] | None:
        """Return NCCL's curve of the nearest number of devices, and the factor on bytes that the ring's share of the buffer gives."""
        key = (operation, ranks)
        if key in self._curves:
            return self._curves[key]
        result: tuple[Curve, float] | None = None
        rows = self._tables.rows("nccl", "num_gpus", "message_bytes", "latency_s", where={"op_name": operation, "nccl_dtype": "half"})
        if rows is not None:
            known = np.unique(rows["num_gpus"])
            nearest = int(known[np.argmin(np.abs(np.log2(known / ranks)))])
            mine = rows["num_gpus"] == nearest
            curve = _sorted_curve(rows["message_bytes"][mine], rows["latency_s"][mine])
            if operation == "all_reduce" and self._engine in ENGINES:
                curve = self._faster(curve, nearest)
            result = (curve, ((ranks - 1) / ranks) / ((nearest - 1) / nearest))
            if nearest != ranks:
                self._policy.fall_back(operation, self._tables.label("nccl"), f"op_name={operation}, num_gpus={ranks}", Provenance.CALIBRATED)
        self._curves[key] = result
        return result

    def _class(self, operation: str) -> Provenance:
        """Return the best class of what is read from NCCL's table; a donor's is refused by `--strict` here."""
        if self._tables.own("nccl"):
            return Provenance.MEASURED
        self._policy.fall_back(operation, self._tables.label("nccl"), f"op_name={operation}", Provenance.EXTRAPOLATED)
        return Provenance.EXTRAPOLATED

    def _faster(self, curve: Curve, ranks: int) -> Curve:
        """Return the engine's own all-reduce (inside a captured graph) at every size where it beats NCCL and the engine takes it.

        All three have such kernels for small messages of one node; where an engine's own were not measured, those of another speak for them.
        """
        rows = None
        for engine in sorted(ENGINES, key=lambda one: one != self._engine):
            rows = self._tables.rows("custom_allreduce", "message_bytes", "latency_s", where={"num_gpus": ranks, "backend": f"{engine}_graph"})
            if rows is not None:
                break
        if rows is None:
            return curve
        own = _sorted_curve(*drop_spikes(*_sorted(rows["message_bytes"], rows["latency_s"])))
        limit = OWN_LIMIT.get(self._engine, {}).get(ranks, np.inf)
        keys = np.union1d(curve.keys, own.keys)
        if limit < np.inf:
            keys = np.union1d(keys, [limit - 1.0, limit])
        nccl = curve(keys).seconds
        return Curve(keys, np.where(keys < limit, np.minimum(nccl, own(keys).seconds), nccl))

    # --- transfers --------------------------------------------------------------------------------------------

    def p2p(self, nbytes: np.ndarray, nodes: int) -> Timing:
        """Return the time of one message between two devices of a node, or of two nodes."""
        size = np.maximum(np.asarray(nbytes, dtype=np.float64), 0.0)
        pair = self._curve("alltoall", 2)
        direct = self._messages()
        if direct is not None:
            curve, worst = direct
            timed = curve(size)
            inside = Timing(seconds=timed.seconds, provenance=np.maximum(timed.provenance, np.uint8(worst)))
            if worst > Provenance.CALIBRATED:
                self._policy.fall_back("p2p", self._tables.label("collective"), "op_name=send_recv", worst)
        elif pair is not None:
            # Each of two devices sends half of its buffer to the other.
            inside = timing(pair[0](2.0 * size).seconds, max(self._class("alltoall"), Provenance.CALIBRATED))
        else:
            self._policy.fall_back("p2p", self._tables.label("nccl"), "op_name=alltoall, num_gpus=2", Provenance.ROOFLINE)
            link = self._link("scale_up", self._up) if nodes == 1 else self._link("scale_out", self._out)
            inside = timing(self._call_s + link.latency_s + size / self._reached(link, size), Provenance.ROOFLINE)
        if nodes == 1 or (pair is None and direct is None):
            return zero_where(inside, size <= 0)
        nic = self._link("scale_out", self._out)
        seconds = nic.latency_s + np.maximum(inside.seconds, self._call_s + size / self._reached(nic, size))
        return zero_where(timing(seconds, np.maximum(inside.provenance, np.uint8(Provenance.CALIBRATED))), size <= 0)

    def _messages(self) -> tuple[Curve, Provenance] | None:
        """Return the table of messages between two devices of a node, and its class."""
        if self._direct is None:
            rows = self._tables.rows("collective", "message_bytes", "latency_s", where={"op_name": "send_recv", "num_nodes": 1})
            self._direct = () if rows is None else (Curve(*drop_spikes(*_sorted(rows["message_bytes"], rows["latency_s"]))), rows.worst)
        return self._direct or None

    def tier_copy(self, name: str, nbytes: np.ndarray, read_Bps: float) -> Timing:
        """Return the time of one copy from a tier behind link `name`, which itself gives at most `read_Bps`; devices that share the port get equal parts."""
        size = np.maximum(np.asarray(nbytes, dtype=np.float64), 0.0)
        # No table covers copies from host memory; the link's own bandwidth, latency and efficiency are all there is.
        self._policy.fall_back("tier_copy", "copies", f"link={name}", Provenance.ROOFLINE)
        link = self._link(name, self._cluster.links.get(name))
        return zero_where(timing(link.latency_s + size / np.minimum(self._reached(link, size), read_Bps), Provenance.ROOFLINE), size <= 0)

    def all_to_all(self, up: np.ndarray, out: np.ndarray, *, ranks: int, devices: int, one_after_the_other: bool) -> Timing:
        """Return the time of the bytes on a rank's ports; the ports work side by side, or one after the other."""
        found = self._curve("alltoall", devices) if devices > 1 else None
        code = max(self._class("alltoall"), Provenance.CALIBRATED) if found is not None else Provenance.ROOFLINE
        if found is not None:
            inside = np.where(up > 0, found[0](up * devices / (devices - 1)).seconds, 0.0)
        else:
            self._policy.fall_back("exchange", self._tables.label("nccl"), f"op_name=alltoall, num_gpus={devices}", code)
            inside = self._transfer(self._up, "scale_up", up, devices - 1) if devices > 1 else np.zeros(up.shape)
            inside = np.where(inside > 0, inside + self._call_s, 0.0)
        between = self._transfer(self._out, "scale_out", out, ranks - devices, ranks // devices) if ranks > devices else np.zeros(out.shape)
        seconds = inside + between if one_after_the_other else np.maximum(inside, between)
        return Timing(seconds=seconds, provenance=np.where(seconds > 0, np.uint8(code), np.uint8(0)))

    def _transfer(self, link: Link | None, name: str, size: np.ndarray, messages: int, nodes: int = 1) -> np.ndarray:
        present = self._link(name, link)
        return np.where(size > 0, present.latency_s + size / self._reached(present, size / max(messages, 1), nodes), 0.0)

    def _reached(self, link: Link, message: np.ndarray, nodes: int | None = None) -> np.ndarray:
        """Return the bytes/s that messages of a size reach; nodes: among which they travel, None: any of the cluster."""
        bandwidth = self.out_Bps(self._cluster.num_nodes if nodes is None else nodes) if link is self._out else self._port_Bps(link)
        curve = link.efficiency
        if len(curve.size_bytes) == 1:
            return np.full(message.shape, bandwidth * curve.efficiency[0])
        return bandwidth * np.interp(np.log(np.maximum(message, 1.0)), np.log(curve.size_bytes), curve.efficiency)

    def _link(self, name: str, link: Link | None) -> Link:
        if link is None:
            raise CostError(f"{self._cluster.name}: links.{name} is missing; ranks that exchange data need it")
        return link


def _sorted(keys: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, first = np.unique(keys, return_index=True)
    return distinct.astype(np.float64), seconds[first]


def _sorted_curve(keys: np.ndarray, seconds: np.ndarray) -> Curve:
    return Curve(*_sorted(keys, seconds))
