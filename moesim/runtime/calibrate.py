"""Measuring the machine at hand: ranks are started, all of them time the same cases at once, and what they found becomes a hardware document with tables.

A device of the document is one rank's share of the machine, measured while the other ranks do the same: what N processes on fewer cores take from each other
is in every number. `<file>.yaml` holds rates, latencies and where they come from; `<file>-tables/` the operators, in the columns of
`moesim.hardware.convert_tables` with the spread of every row: (third quartile − first) / median over blocks and ranks. Seconds and bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moesim import __version__
from moesim.errors import InputError, MoesimError, describe
from moesim.files import write_atomic
from moesim.hardware.convert_tables import KINDS, write_table

SCHEMA = "moesim.calibrate/1"
LOOPBACK = "127.0.0.1"
MAX_RANKS = 64
BLOCK_S = {True: 0.01, False: 0.04}
"""Length of a block of calls, quick or not."""
DISK_BYTES = {True: 32 << 20, False: 256 << 20}
EXCHANGE = "deepep_ll_1node"
"""The table in which the cost model looks for dispatch and combine with one message per (token, expert)."""
DESCRIPTIONS = {
    **KINDS,
    EXCHANGE: "Dispatch and combine of moesim's runtime, uniform routing; num_token: FP8 (combine: 16-bit) tokens per device of an 8-device node that load "
    "a port as much as the measured up_bytes",
    "nccl": "Collective inside one machine; message_size is the elements of the full buffer, message_bytes its bytes",
}
LEAST_SLOPE = 1e-3
"""Share by which an exchange's last size takes longer than the one before, at least: the cost model takes the port's rate from there."""
LIMIT_S = {True: 12.0, False: 240.0}
"""Seconds of timing after which samples become short; a busy machine is measured roughly, but not for ever."""
UNITS = {"latency_s": "s", "dispatch_avg_t_s": "s", "combine_avg_t_s": "s", "up_bytes": "B", "message_bytes": "B", "moved_bytes": "B"}


def calibrate(
    out: Path, *, quick: bool = False, ranks: int = 1, model: str | None = None, on_progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure this machine as `ranks` devices and write `out` (YAML) and its tables; return the report, schema moesim.calibrate/1.

    model: measure the sizes of this model instead of a general grid. Raises InputError if `out` cannot be written or the ranks do not fit the machine.
    """
    import torch

    from moesim.runtime import calibrate_cases as cases

    began = time.perf_counter()
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(describe("calibrate", "-o", out, "must end in .yaml"))
    if not 1 <= ranks <= MAX_RANKS:
        raise InputError(describe("calibrate", "--ranks", ranks, f"must be in 1..{MAX_RANKS}"))
    cuda = torch.cuda.is_available()
    if cuda and ranks > torch.cuda.device_count():
        raise InputError(describe("calibrate", "--ranks", ranks, f"must be <= the {torch.cuda.device_count()} GPUs of this machine"))
    grid = cases.general(quick, ranks)
    if model is not None:
        from moesim.model.hf_config import load_model

        grid = cases.of_model(load_model(model), quick, ranks)
    threads = max((os.cpu_count() or 1) // ranks, 1)
    load = os.getloadavg()[0]
    disk = _disk(out, DISK_BYTES[quick])  # first, because it finds out whether `out` can be written at all
    on_progress(f"timing on {ranks} ranks of {threads} threads")
    found, facts = measure(grid, ranks=ranks, threads=threads, device="cuda" if cuda else "cpu", quick=quick)
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "moesim": __version__, "cpu": _cpu_name(), "cores": os.cpu_count() or 1, "ranks": ranks,
        "load_before": round(load, 2), "quick": quick, "sizes": model or "general", **facts,
    }  # fmt: skip
    source = provenance(machine)
    folder = out.with_name(f"{out.stem}-tables")
    rows = write_tables(folder, found, source=source, version=f"torch{facts['torch'].partition('+')[0]}")
    document = describe_machine(found, machine, disk, name=out.stem, tables=folder.name, source=source)
    _write_yaml(out, document)
    from moesim.hardware.load import load_cluster

    cluster = load_cluster(out)
    return {
        "schema": SCHEMA, "hardware": str(out), "name": cluster.name, "num_ranks": cluster.num_ranks, "tables": rows, "machine": machine,
        "rates": {
            "flops": dict(cluster.device.peak_flops), "memory_Bps": cluster.memory.read_Bps, "kernel_launch_s": cluster.device.kernel_launch_s,
            **{f"{link.name}_Bps": link.bandwidth_Bps for link in cluster.links.values()},
        },
        "spread": {kind: float(np.median([row["spread"] for row in table])) for kind, table in found.items()}, "wall_s": time.perf_counter() - began,
    }  # fmt: skip


def measure(grid: Any, *, ranks: int, threads: int, device: str, quick: bool) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Start `ranks` processes, let them time the cases of `grid`, and return rows by table and what torch says of the machine.

    A row's latency is the mean over ranks of their medians. Raises MoesimError with a rank's last words if one fails.
    """
    import torch.distributed as dist

    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="moesim-calibrate-") as scratch:
        settings = {"host": LOOPBACK, "port": store.port, "ranks": ranks, "threads": threads, "device": device, "folder": scratch}
        settings |= {"block_s": BLOCK_S[quick], "limit_s": LIMIT_S[quick]}
        path = Path(scratch, "settings.json")
        path.write_text(json.dumps({**settings, "grid": dataclasses.asdict(grid)}))
        processes = []
        try:
            for rank in range(ranks):
                environment = {**os.environ, "RANK": str(rank), "MOESIM_CALIBRATE": str(path), "OMP_NUM_THREADS": str(threads)}
                command = [sys.executable, "-m", "moesim.runtime.calibrate_rank"]
                with Path(scratch, f"stderr-{rank}").open("wb") as errors:
                    processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=errors))
            _await(processes, Path(scratch))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = [json.loads(Path(scratch, f"rank-{rank}.json").read_bytes()) for rank in range(ranks)]
    return joined([result["rows"] for result in results]), results[0]["facts"]


def joined(rows_R: list[list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return rows by table from what every rank measured of the same cases, in the same order."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for same in zip(*rows_R, strict=True):
        samples_RB = np.array([row["samples"] for row in same])
        first, middle, third = np.percentile(samples_RB, [25, 50, 75])
        latency = float(np.median(samples_RB, axis=1).mean())
        found[same[0]["kind"]].append({**same[0]["keys"], "latency_s": latency, "spread": float((third - first) / middle)})
    if "exchange" in found:
        found[EXCHANGE] = exchange_rows(found.pop("exchange"))
    return dict(found)


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
        seconds = np.maximum.accumulate([seconds for _, seconds in mine])  # more bytes never take less time; noise says otherwise
        seconds[-1] = max(seconds[-1], seconds[:-1].max(initial=0.0) * (1 + LEAST_SLOPE))
        curves[stage] = np.array([key for key, _ in mine]), seconds
    every = np.unique(np.concatenate([keys for keys, _ in curves.values()]))
    spread = float(np.median([row["spread"] for row in rows]))
    at = {stage: _along(every, *curve) for stage, curve in curves.items()}
    return [
        {
            "node_num": 1, **shape, "num_token": float(key), "dispatch_avg_t_s": float(at["dispatch"][index]), "combine_avg_t_s": float(at["combine"][index]),
            "spread": spread,
        }
        for index, key in enumerate(every.tolist())
    ]  # fmt: skip


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


def provenance(machine: Mapping[str, Any]) -> str:
    """Return where the numbers come from, in one line for people."""
    what = machine.get("gpu") or machine["cpu"]
    count = f"{machine['ranks']} ranks of {machine['threads']} threads at once on {machine['cores']} cores"
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    return (
        f"Measured {machine['date']} by moesim calibrate {machine['moesim']} on {what}: {count}, torch {machine['torch']}{cuda}, "
        f"sizes {machine['sizes']}, load average before {machine['load_before']}"
    )


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
    capacity = machine["memory"] if gpu else _host_bytes() // machine["ranks"]
    tiers: dict[str, Any] = {
        "hbm" if gpu else "dram": {"capacity": _bytes(capacity), "read": _rate(read), "write": _rate(write), "source": source},
        "nvme": {
            "capacity": _bytes(disk["capacity"]), "read": _rate(disk["read_Bps"]), "write": _rate(disk["write_Bps"]), "latency": _time(disk["latency_s"]),
            "attached_to": "node", "shared": True, "link": "disk", "source": f"{source}; one file, read past the page cache where the system allows it",
        },
    }  # fmt: skip
    links: dict[str, Any] = {"disk": {"bandwidth": _rate(disk["read_Bps"]), "latency": _time(disk["latency_s"]), "shared_by": "node", "source": source}}
    if gpu:
        links["host"] = _link([row for row in found["copy"] if row["operator"] == "to_device"], "moved_bytes", 1.0, source)
        tiers["dram"] = {
            "capacity": _bytes(_host_bytes()), "bandwidth": links["host"]["bandwidth"], "attached_to": "node", "shared": True, "link": "host", "source": source,
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


def _disk(out: Path, nbytes: int) -> dict[str, float]:
    """Write and read back a file beside `out`; raise InputError if that cannot be written."""
    path = out.with_name(f".{out.name}.disk-{os.getpid()}")
    block = os.urandom(1 << 20)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            begin = time.perf_counter()
            for _ in range(nbytes >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            file.read(4096)
            latency = time.perf_counter() - begin
            begin = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = time.perf_counter() - begin
        capacity = os.statvfs(path).f_frsize * os.statvfs(path).f_blocks
    except OSError as cause:
        raise InputError(f"{out}: cannot be written ({cause.strerror or cause}); check the folder and the free space") from None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return {"read_Bps": nbytes / read, "write_Bps": nbytes / written, "latency_s": latency, "capacity": float(capacity)}


def _await(processes: list[subprocess.Popen[bytes]], scratch: Path) -> None:
    deadline = time.monotonic() + 3600
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in processes):
            break
        time.sleep(0.05)
    bad = [rank for rank, process in enumerate(processes) if process.poll() != 0]
    if bad:
        words = Path(scratch, f"stderr-{bad[0]}").read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise MoesimError(f"calibrate: rank {bad[0]} failed: {words[0][:300]}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(value: float) -> str:
    return f"{value / 2**30:.5g} GiB"


def _rate(value: float) -> str:
    return f"{value / 1e9:.5g} GB/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us"


def _write_yaml(path: Path, document: Mapping[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=160)
    write_atomic(path, text.encode())
