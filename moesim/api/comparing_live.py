"""`compare HOST:PORT`: a live deployment's last steps beside what was predicted for its plan; nothing stands still for it.

The ranks count their loads, bytes and times step by step and keep the last few thousand steps. The prediction knows the loads of experts before the plan was
installed, where those steps are still held, and how many tokens of which phase every step had; which experts a token chose is drawn anew from the loads.
A signed error is (predicted − measured) / measured. Shapes: S steps, L MoE layers, E experts, R ranks, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.api.comparing import RUNTIME, SCHEMA, beside, loads_beside, step_times_beside
from moesim.api.documents import cluster_of, model_of, trace_shape
from moesim.api.replaying import replay
from moesim.errors import ApplyError, InputError, describe
from moesim.files import canonical_json, sha256_hex
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.runtime import client
from moesim.traces.routing_trace import DECODE, PREFILL, GroupInfo, RoutingTrace, TokenBatch

LEAST_STEPS = 4


class StepSource:
    """Made-up tokens with the phases and numbers of measured steps, all in one unit."""

    def __init__(self, batch: TokenBatch) -> None:
        self._batch = batch
        self.groups = [GroupInfo(rows=len(batch), step_min=int(batch.step_T.min()), step_max=int(batch.step_T.max()))]

    def read(self, index: int) -> TokenBatch:
        """Return the rows."""
        return self._batch


def compare_live(
    address: str, *, model: str | MoEModel, hardware: str | Cluster, steps: int = 128, settings: Mapping[str, str] | None = None, strict: bool = False,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return prediction and measurement of the last `steps` steps (fewer if the plan is younger) of the deployment at `address`, schema moesim.compare/1.

    seed: of the tokens that are drawn. Raises ApplyError if no deployment answers, InputError if the plan has not served enough steps or the model and the
    hardware are not the deployment's.
    """
    moe_model, cluster = model_of(model), cluster_of(hardware)
    now, earlier = _windows(address, steps)
    plan = Plan.from_content(now["plan"], f"{address}: plan")
    plan.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
    seen_LE = np.array(now["rows_LE"], dtype=np.float64)
    known_LE = seen_LE if earlier is None else np.array(earlier["rows_LE"], dtype=np.float64)
    prefill_RS, decode_RS, ms_RS, bytes_RS = (np.array([each[name] for each in now["each_R"]]) for name in ("prefill", "decode", "ms", "exchanged_bytes"))
    tokens = int(prefill_RS.sum() + decode_RS.sum())
    known_tokens = max(round(float(known_LE[0].sum()) / moe_model.top_k), 1)
    trace = _drawn(address, moe_model, known_LE, prefill_RS, decode_RS, np.random.Generator(np.random.PCG64(seed)))
    execution = {**RUNTIME, **(settings or {})}
    run = replay(trace, model=moe_model, hardware=cluster, plan=plan, settings=execution, strict=strict, as_recorded=True)
    is_prefill_S = prefill_RS.sum(axis=0) > 0
    sent = float(run.report["bytes"]["intra_node"] + run.report["bytes"]["inter_node"]) / max(int(run.report["tokens"]), 1)
    exchanged_s = float(np.mean([each["exchanged_s"] for each in now["each_R"]]))
    ranks, count = len(ms_RS), ms_RS.shape[1]
    stages = {name: seconds * 1e3 / max(int(run.report["steps"]), 1) for name, seconds in run.ledger.total_s.items()}
    report: dict[str, Any] = {
        "schema": SCHEMA, "plan": plan.source, "map_sha256": plan.map_sha256, "hardware": cluster.name, "times": "model", "settings": execution,
        "basis": "same steps" if earlier is None else "steps before", "steps": {"predicted": int(run.report["steps"]), "measured": count},
        "tokens": {"predicted": int(run.report["tokens"]), "measured": tokens},
        "rank_load": loads_beside(plan.rank_load_LR(known_LE), np.array(now["load_LR"], dtype=np.float64), known_tokens, tokens, moe_model),
        "step_ms": step_times_beside(np.asarray(run.ledger.duration_s) * 1e3, is_prefill_S, ms_RS.max(axis=0), is_prefill_S),
        "bytes_per_token": beside(sent, float(bytes_RS.sum()) / max(tokens, 1)),
        "stages_ms": {
            "exchanges": beside(stages.get("dispatch", 0.0) + stages.get("combine", 0.0), exchanged_s * 1e3),
            "experts": beside(stages.get("experts", 0.0), float(now["compute_s"]) * 1e3 / count / ranks),
        },
        "provenance": run.report["provenance"],
    }  # fmt: skip
    report["rank_load"]["measured_from"] = "counts of the ranks"
    return report


def _windows(address: str, steps: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the counts of the last steps under the installed plan, and of as many before it, if they are still held."""
    status = client.status(address)
    if status["state"] != "serving":
        raise ApplyError(f"{address}: does not serve: {status['reason']}")
    last = min((int(rank["step"]) for rank in status["rank_status"] if rank is not None), default=0)
    first = max(last - steps, 0)
    epoch = max(int(rank["epoch"]) for rank in status["rank_status"] if rank is not None)
    while last - first >= LEAST_STEPS:
        found = client.counts(address, first, last)
        if found["epochs"] == [epoch]:
            return found, _before(address, first, steps, epoch)
        first = (first + last + 1) // 2
    raise InputError(describe("compare", "steps", last - first, f"must be >= {LEAST_STEPS} under the installed plan", "let the deployment serve on"))


def _before(address: str, first: int, steps: int, epoch: int) -> dict[str, Any] | None:
    """Return the counts of the latest window before `first` that another plan served alone; None if no such steps are held."""
    last = first
    while last > 0:
        begin = max(last - steps, 0)
        try:
            found = client.counts(address, begin, last)
        except ApplyError:  # steps that are no longer held
            return None
        if epoch not in found["epochs"]:
            return found
        last = begin
    return None


def _drawn(
    address: str, model: MoEModel, load_LE: np.ndarray, prefill_RS: np.ndarray, decode_RS: np.ndarray, rng: np.random.Generator
) -> RoutingTrace:  # fmt: skip
    """Return a trace whose steps have the tokens that were measured, and choices drawn from `load_LE` without repetition in a token."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("step", "rank", "request", "position", "phase")}
    for rank in range(prefill_RS.shape[0]):
        context = 0
        for step in range(prefill_RS.shape[1]):
            new, going = int(prefill_RS[rank, step]), int(decode_RS[rank, step])
            requests = going or int(decode_RS[rank, step + 1 : step + 2].sum()) or 1
            if new:
                context = -(-new // requests)
                self_positions, of_request = np.arange(new) % context, np.arange(new) // context
            else:
                self_positions, of_request, context = np.full(going, context), np.arange(going), context + 1
            rows = len(of_request)
            for name, values in (
                ("step", np.full(rows, step)), ("rank", np.full(rows, rank)), ("request", of_request + (rank << 32)), ("position", self_positions),
                ("phase", np.full(rows, PREFILL if new else DECODE)),
            ):  # fmt: skip
                columns[name].append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((joined["rank"], joined["step"]))
    shape = trace_shape(model)
    weight_LE = np.log(np.maximum(load_LE, 1e-3))
    ids = np.stack([np.argpartition(-(row + rng.gumbel(size=(len(order), len(row)))), shape.top_k - 1, axis=1)[:, : shape.top_k] for row in weight_LE], axis=1)
    kinds = {"step": np.uint32, "rank": np.uint16, "request": np.uint64, "position": np.uint32, "phase": np.uint8}
    typed = {f"{name}_T": values[order].astype(kinds[name]) for name, values in joined.items()}
    batch = TokenBatch(**typed, experts_TLK=np.ascontiguousarray(ids.astype(shape.dtype)))
    return RoutingTrace(
        shape=shape, kind="tokens", num_rows=len(order), provenance={"tool": "moesim compare", "notes": ["choices drawn from counts"]},
        fingerprint=sha256_hex(canonical_json({"loads": load_LE.tolist()})), source=address, tokens=StepSource(batch),
    )  # fmt: skip
