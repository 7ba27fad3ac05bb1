"""Writing what was measured: tables in the columns that the cost model looks rows up by, and the hardware document that names them. Seconds and bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesim.files import write_atomic
from moesim.hardware.convert_tables import KINDS, write_table

EXCHANGE = "deepep_ll_1node"
"""The table in which the cost model looks for dispatch and combine with one message per (token, expert)."""
DESCRIPTIONS = {
    **KINDS,
    EXCHANGE: "Dispatch and combine of moesim's runtime, even routing; num_token: FP8 (combine: 16-bit) tokens per device of an 8-device node that load "
    "a port as much as the measured up_bytes",
    "nccl": "Collective inside one machine; message_size is the elements of the full buffer, message_bytes its bytes",
    "stage": "What a rank does by itself in a layer of moesim's runtime, before the layers (operator embedding) and after them (head), all ranks in the same "
    "step; num_tokens: new ones of a rank, context: tokens of a request with the new ones",
}
LEAST_SLOPE = 1e-3
"""Share by which an exchange's last size takes longer than the one before, at least: the cost model takes the port's rate from there."""
SECONDS = ("latency_s", "p10_s", "p90_s", "dispatch_avg_t_s", "combine_avg_t_s")
UNITS = {**dict.fromkeys(SECONDS, "s"), "up_bytes": "B", "message_bytes": "B", "moved_bytes": "B"}


def exchange_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `EXCHANGE` from the measured rows of both stages.

    The cost model reads that table at the tokens of an 8-device node whose scale-up port carries as many bytes, so its key is computed by the same rule. A
    token has fewer bytes in dispatch (FP8) than in combine there, so the stages have different keys; each curve is given at the keys of both, between its own.
    """
    from moesim.costs.exchange import FP8_BLOCK, TABLE_DEVICES
    from moesim.costs.traffic import balanced_counts, ports

    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    shape = {name: int(rows[0][name]) for name in ("hidden_size", "num_topk", "num_experts")}
    hidden, top_k, experts = shape.values()
    counts = balanced_counts(num_ranks=TABLE_DEVICES, devices=TABLE_DEVICES, num_experts=experts, top_k=top_k)
    copies = float(ports("low_latency", TABLE_DEVICES, **counts).up_out[0])
    for stage, size in (("dispatch", hidden + 4.0 * -(-hidden // FP8_BLOCK)), ("combine", 2.0 * hidden)):
        mine = sorted((row["up_bytes"] / (copies * size), row["latency_s"]) for row in rows if row["stage"] == stage)
        seconds = rising(np.array([seconds for _, seconds in mine]))
        seconds[-1] = max(seconds[-1], seconds[:-1].max(initial=0.0) * (1 + LEAST_SLOPE))
        curves[stage] = np.array([key for key, _ in mine]), seconds
    every = np.unique(np.concatenate([keys for keys, _ in curves.values()]))
    spread, samples = float(np.median([row["spread"] for row in rows])), min(int(row["samples"]) for row in rows)
    at = {stage: _along(every, *curve) for stage, curve in curves.items()}
    return [
        {
            "node_num": 1, **shape, "num_token": float(key), "dispatch_avg_t_s": float(at["dispatch"][index]), "combine_avg_t_s": float(at["combine"][index]),
            "spread": spread, "samples": samples,
        }
        for index, key in enumerate(every.tolist())
    ]  # fmt: skip


def rising(values: np.ndarray) -> np.ndarray:
    """Return the nearest values (least squares) that never fall: more bytes never take less time, whatever noise says."""
    runs: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while runs and runs[-1][0] >= mean:
            before, size = runs.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        runs.append((mean, count))
    return np.repeat([mean for mean, _ in runs], [count for _, count in runs])


def _along(at: np.ndarray, keys: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return a curve at other keys: linear between its own, along its last stretch beyond, as at its first before."""
    slope = max((seconds[-1] - seconds[-2]) / (keys[-1] - keys[-2]), 0.0) if len(keys) > 1 else 0.0
    return np.asarray(np.interp(at, keys, seconds) + np.maximum(at - keys[-1], 0.0) * slope)


def write_tables(folder: Path, found: Mapping[str, list[dict[str, Any]]], *, source: str, version: str) -> dict[str, int]:
    """Write the tables that the cost model reads, replacing earlier ones; return stem → rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    written = {}
    for kind, rows in found.items():
        if kind not in DESCRIPTIONS:
            continue
        arrays = {name: np.array([row[name] for row in rows], dtype=object if isinstance(rows[0][name], str) else None) for name in rows[0]}
        units = {name: unit for name, unit in UNITS.items() if name in arrays}
        metadata = {"kind": kind, "description": DESCRIPTIONS[kind], "source": source, "licence": "none: measured by the user", "version": version}
        write_table(folder / f"{kind}_{version}.parquet", arrays, {**metadata, "units": json.dumps(units, sort_keys=True)})
        written[f"{kind}_{version}"] = len(rows)
    return dict(sorted(written.items()))


def describe_machine(
    found: Mapping[str, list[dict[str, Any]]], machine: Mapping[str, Any], disk: Mapping[str, float], *, name: str, tables: str, source: str
) -> dict[str, Any]:
    """Return the hardware document, human units as text."""
    gpu = "gpu" in machine
    rates: dict[str, float] = {}
    for row in found["gemm"]:
        rates[row["gemm_dtype"]] = max(rates.get(row["gemm_dtype"], 0.0), 2.0 * row["m"] * row["n"] * row["k"] / row["latency_s"])
    memory = {row["operator"]: row["moved_bytes"] / row["latency_s"] for row in found["memory"]}
    streamed = max(row["moved_bytes"] / row["latency_s"] for row in found["stream"] if row["operator"] == "copy")
    # A copy reads and writes at once, so it can move more than a sum reads.
    read, write = max(memory["read"], streamed), max(memory["write"], streamed)
    capacity = machine["memory"] if gpu else host_bytes() // machine["ranks"]
    tiers: dict[str, Any] = {
        "hbm" if gpu else "dram": {"capacity": _bytes(capacity), "read": _rate(read), "write": _rate(write), "source": source},
        "nvme": {
            "capacity": _bytes(disk["capacity"]), "read": _rate(disk["read_Bps"]), "write": _rate(disk["write_Bps"]), "latency": _time(disk["latency_s"]),
            "attached_to": "node", "shared": True, "link": "disk", "source": f"{source}; one file, read {disk['how']}",
        },
    }  # fmt: skip
    links: dict[str, Any] = {"disk": {"bandwidth": _rate(disk["read_Bps"]), "latency": _time(disk["latency_s"]), "shared_by": "node", "source": source}}
    if gpu:
        links["host"] = _link([row for row in found["copy"] if row["operator"] == "to_device"], "moved_bytes", 1.0, source)
        tiers["dram"] = {
            "capacity": _bytes(host_bytes()), "bandwidth": links["host"]["bandwidth"], "attached_to": "node", "shared": True, "link": "host", "source": source,
        }  # fmt: skip
    size = machine["ranks"]
    if size > 1:
        rows = [row for row in found["nccl"] if row["op_name"] == "alltoall"]
        links["scale_up"] = _link(rows, "message_bytes", (size - 1) / size, source)
        links["scale_up"]["kind"] = "between GPUs, NCCL" if gpu else "between processes, gloo over loopback"
    return {
        "format": "moesim.hardware/1", "name": name, "description": f"{size} of {size} devices of this machine; {source}",
        "device": {
            "name": machine.get("gpu") or f"1/{size} of {machine['cpu']}", "kind": "gpu" if gpu else "cpu",
            "peak_flops": {dtype: f"{rate / 1e9:.4g} GFLOP/s" for dtype, rate in rates.items()},
            "num_sms": int(machine.get("sms", max(machine["cores"] // size, 1))), "gemm_efficiency": 1.0, "memory_efficiency": 1.0,
            "kernel_launch": _time(found["launch"][0]["latency_s"]), "source": f"{source}; peak_flops is the fastest product measured",
        },
        "tiers": tiers, "links": links, "devices_per_node": size, "tables": tables,
    }  # fmt: skip


def _link(rows: list[dict[str, Any]], column: str, share: float, source: str) -> dict[str, Any]:
    """Return a link whose curve passes through the measured sizes, of which `share` crosses it."""
    rows = sorted(rows, key=lambda row: float(row[column]))
    latency = rows[0]["latency_s"]
    speeds = [row[column] * share / max(row["latency_s"] - latency, 0.1 * row["latency_s"]) for row in rows]
    most = max(speeds)
    shares = [max(round(speed / most, 4), 1e-4) for speed in speeds]
    curve = {"sizes": [f"{int(row[column])} B" for row in rows], "shares": shares}
    return {"bandwidth": _rate(most), "latency": _time(latency), "efficiency": curve, "source": source}


def host_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write_yaml(path: Path, document: Mapping[str, Any]) -> None:
    """Write a hardware document."""
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=160)
    write_atomic(path, text.encode())


def _bytes(value: float) -> str:
    return f"{value / 2**30:.5g} GiB"


def _rate(value: float) -> str:
    return f"{value / 1e9:.5g} GB/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us"
