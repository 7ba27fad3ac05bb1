"""Measuring the machine at hand: ranks are started, all of them time the same cases at once, and what they found becomes a hardware document with tables.

A device of the document is one rank's share of the machine, measured while the other ranks do the same: what N processes on fewer cores take from each other
is in every number. For one model (`--model`) the ranks also rehearse its layers as the runtime serves them. `<file>.yaml` holds rates, latencies and where
they come from; `<file>-tables/` the operators; `<file>-spool/` exists while ranks measure, and lets a calibration that was interrupted go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from moesim import __version__
from moesim.errors import InputError, MoesimError, describe
from moesim.files import read_json
from moesim.runtime.calibrate_disk import measure_disk
from moesim.runtime.calibrate_write import EXCHANGE, describe_machine, exchange_rows, write_tables, write_yaml

SCHEMA = "moesim.calibrate/1"
LOOPBACK = "127.0.0.1"
MAX_RANKS = 64
BLOCK_S = {True: 0.01, False: 0.04}
"""Length of a block of calls, quick or not."""
DISK_BYTES = {True: 32 << 20, False: 256 << 20}
LIMIT_S = {True: 12.0, False: 240.0}
"""Seconds of timing after which samples become short; a busy machine is measured roughly, but not for ever."""
REHEARSED = ("stage", "exchange")
"""Tables whose samples are single calls: their mean is what adds up to a step. Other samples are means over blocks already, and their median is robust."""
REHEARSAL: dict[bool, dict[str, Any]] = {
    True: {"batches": (1, 4, 16), "lengths": (16, 64), "rounds": 6, "decodes": 3, "limit_s": 15.0},
    False: {"batches": (1, 2, 4, 8, 16, 32), "lengths": (8, 16, 32, 64, 128), "rounds": 9, "decodes": 3, "limit_s": 180.0},
}
"""Requests of a rank, lengths of their prompts, rounds through all of them, decode steps of a wave, and seconds after which rounds are left out."""
MOST_S = 3600
"""Longest that a calibration takes."""
WAIT_S = 600
"""Longest that a rank of a launcher waits for the first rank's settings."""


def calibrate(
    out: Path, *, quick: bool = False, ranks: int | None = None, model: str | None = None, resume: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:  # fmt: skip
    """Measure this machine as `ranks` devices and write `out` (YAML) and its tables; return the report, schema moesim.calibrate/1.

    ranks: processes to start (default 1); under torchrun its own are measured, and all but the first return None. model: measure the sizes of this model
    instead of a general grid, and its layers. resume: go on with what an interrupted calibration of the same kind has spooled. Raises InputError if `out`
    cannot be written or the ranks do not fit the machine.
    """
    import torch

    began = time.perf_counter()
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(describe("calibrate", "-o", out, "must end in .yaml"))
    launched = _launched(ranks)
    if launched is not None and launched.rank:
        launched.follow()
        return None
    size = launched.size if launched is not None else ranks or 1
    if not 1 <= size <= MAX_RANKS:
        raise InputError(describe("calibrate", "--ranks", size, f"must be in 1..{MAX_RANKS}"))
    cuda = torch.cuda.is_available()
    if cuda and size > torch.cuda.device_count():
        raise InputError(describe("calibrate", "--ranks", size, f"must be <= the {torch.cuda.device_count()} GPUs of this machine"))
    settings, note = _settings(model, quick=quick, size=size, cuda=cuda)
    load = os.getloadavg()[0]
    disk = measure_disk(out, DISK_BYTES[quick])  # first, because it finds out whether `out` can be written at all
    spool = out.with_name(f"{out.stem}-spool").absolute()
    done = _prepared(spool, settings, resume=resume)
    settings |= {"folder": str(spool), "done": done}
    on_progress(f"timing on {size} ranks of {settings['threads']} threads" + (f", {done} cases are there" if done else ""))
    busy = _busy_s(), time.perf_counter()
    try:
        facts = measure(settings) if launched is None else launched.lead(settings)
    except (MoesimError, KeyboardInterrupt) as cause:
        kept = spooled(spool, size)
        why = "calibrate: interrupted" if isinstance(cause, KeyboardInterrupt) else str(cause)
        raise MoesimError(f"{why}; {kept} cases are kept in {spool}, go on with --resume" if kept else why) from None
    others = None if busy[0] is None or launched is not None else ((_busy_s() or 0.0) - busy[0]) / (time.perf_counter() - busy[1])
    found = joined([_rows(spool, rank) for rank in range(size)], settings["shape"])
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "moesim": __version__, "cpu": _cpu_name(), "cores": os.cpu_count() or 1, "ranks": size,
        "started_by": "moesim" if launched is None else "launcher", "load_before": round(load, 2),
        "others_cores": None if others is None else round(max(others, 0.0), 2), "quick": quick, "sizes": model or "general",
        "layers": note, "disk": disk["how"], "python": platform.python_version(), "system": f"{platform.system()} {platform.release()}",
        **({} if _governor() is None else {"governor": _governor()}), **facts,
    }  # fmt: skip
    source = provenance(machine)
    folder = out.with_name(f"{out.stem}-tables")
    rows = write_tables(folder, found, source=source, version=f"torch{facts['torch'].partition('+')[0]}")
    write_yaml(out, describe_machine(found, machine, disk, name=out.stem, tables=folder.name, source=source))
    from moesim.hardware.load import load_cluster

    cluster = load_cluster(out)
    shutil.rmtree(spool, ignore_errors=True)
    return {
        "schema": SCHEMA, "hardware": str(out), "name": cluster.name, "num_ranks": cluster.num_ranks, "tables": rows, "machine": machine, "resumed": done,
        "rates": {
            "flops": dict(cluster.device.peak_flops), "memory_Bps": cluster.memory.read_Bps, "kernel_launch_s": cluster.device.kernel_launch_s,
            **{f"{link.name}_Bps": link.bandwidth_Bps for link in cluster.links.values()},
        },
        "spread": {kind: float(np.median([row["spread"] for row in table])) for kind, table in found.items()}, "wall_s": time.perf_counter() - began,
    }  # fmt: skip


def _settings(name: str | None, *, quick: bool, size: int, cuda: bool) -> tuple[dict[str, Any], str]:
    """Return what decides the cases, and a note on whether layers are rehearsed."""
    from moesim.runtime import calibrate_cases as cases

    grid, spec, shape, note = cases.general(quick, size), None, {}, "not rehearsed: no --model"
    if name is not None:
        from moesim.costs.stages import shape_of
        from moesim.model.hf_config import load_model
        from moesim.runtime.spec import read_spec

        model = load_model(name)
        grid, shape = cases.of_model(model, quick, size), shape_of(model)
        try:
            spec = read_spec(name, dtype=model.dtype)
            small = "not rehearsed: the runtime would serve this model scaled down" if spec.scaled else None
            note = small or (f"not rehearsed: {spec.num_experts} experts do not divide over {size} ranks" if spec.num_experts % size else "rehearsed")
            note = "not rehearsed: the runtime serves on CPU only" if cuda else note
        except InputError as cause:
            note = f"not rehearsed: {cause}"
        spec = spec if note == "rehearsed" else None
    if spec is not None:  # the layers' own experts are timed; an operator has one row per size
        grid = dataclasses.replace(grid, experts=())
    threads = 1 if spec is not None else max((os.cpu_count() or 1) // size, 1)  # a rank of the runtime computes in one thread
    settings = {
        "ranks": size, "threads": threads, "device": "cuda" if cuda else "cpu", "quick": quick, "block_s": BLOCK_S[quick], "limit_s": LIMIT_S[quick],
        "rehearsal": REHEARSAL[quick], "grid": dataclasses.asdict(grid), "spec": None if spec is None else dataclasses.asdict(spec),
        "shape": shape, "moesim": __version__,
    }  # fmt: skip
    return settings, note


# --- ranks ------------------------------------------------------------------------------------------------------------


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Start the ranks, let them spool what they measure, and return what torch says of the machine.

    Raises MoesimError with a rank's last words if one fails.
    """
    import torch.distributed as dist

    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    spool = Path(settings["folder"])
    path = spool / "ranks.json"
    path.write_text(json.dumps({**settings, "host": LOOPBACK, "port": store.port}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    with (spool / "stderr").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", "moesim.runtime.calibrate_rank", str(path)], env=environment, stdin=subprocess.DEVNULL, stderr=errors)
    try:
        code = process.wait(timeout=MOST_S)
    except subprocess.TimeoutExpired:
        raise MoesimError(f"calibrate: is not over after {MOST_S} s") from None
    finally:
        process.kill()
        process.wait()
    if code:
        name, place = (f"rank {code - 1}", f"stderr-{code - 1}") if code > 0 else ("the process of the ranks", "stderr")
        words = (spool / place).read_text(errors="replace").strip().splitlines()[-1:] if (spool / place).is_file() else []
        raise MoesimError(f"calibrate: {name} failed: {words[0][:300] if words else f'exit code {code}'}")
    facts = read_json(spool / "facts-0.json")
    assert isinstance(facts, dict)
    return facts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """This process as one rank of torchrun or another launcher that sets RANK and WORLD_SIZE; all of them on this machine."""

    rank: int
    size: int
    store: Any

    def lead(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Give the settings to the other ranks and measure with them; return the facts."""
        self.store.set("calibrate/settings", json.dumps({**settings, "host": LOOPBACK}))
        return self._measured({**settings, "host": LOOPBACK})

    def follow(self) -> None:
        """Measure what the first rank says."""
        self.store.wait(["calibrate/settings"], timedelta(seconds=WAIT_S))
        self._measured(json.loads(self.store.get("calibrate/settings")))

    def _measured(self, settings: dict[str, Any]) -> dict[str, Any]:
        from moesim.runtime.calibrate_rank import measure_rank

        return measure_rank(settings, rank=self.rank, store=self.store, address=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))


def _launched(ranks: int | None) -> _Launched | None:
    """Meet the other ranks of the launcher; None if this process was started alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if size != here:
        raise InputError(describe("calibrate", "WORLD_SIZE", size, f"must equal the {here} ranks of this machine", "calibrate one machine at a time"))
    if ranks is not None and ranks != size:
        raise InputError(describe("calibrate", "--ranks", ranks, f"must be the launcher's {size}, or left out"))
    import torch.distributed as dist

    store, rank, size = next(iter(dist.rendezvous("env://")))
    return _Launched(rank=rank, size=size, store=store)


# --- spool ------------------------------------------------------------------------------------------------------------


def _prepared(spool: Path, settings: Mapping[str, Any], *, resume: bool) -> int:
    """Make the folder in which ranks spool, and return how many cases all of them have there. Raises InputError if they are of other settings."""
    place = spool / "settings.json"
    if resume and place.is_file():
        held = read_json(place)
        wanted = json.loads(json.dumps(settings))
        other = sorted(key for key in wanted if not isinstance(held, dict) or held.get(key) != wanted[key])
        if other:
            raise InputError(f"{place}: is of a calibration with other {', '.join(other)}; resume with the same options, or start anew without --resume")
        return spooled(spool, settings["ranks"])
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(parents=True)
    place.write_text(json.dumps(settings))
    return 0


def spooled(spool: Path, ranks: int) -> int:
    """Return how many whole cases all ranks have spooled."""
    paths = [spool / f"rank-{rank}.jsonl" for rank in range(ranks)]
    return min(path.read_bytes().count(b"\n") if path.is_file() else 0 for path in paths)


def _rows(spool: Path, rank: int) -> list[dict[str, Any]]:
    return [row for line in (spool / f"rank-{rank}.jsonl").read_bytes().splitlines() for row in json.loads(line)]


def joined(rows_R: list[list[dict[str, Any]]], shape: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return rows by table from what every rank measured of the same cases, in the same order; `shape` is the model of rehearsed rows.

    A latency is the mean over ranks: of the means of single calls, of the medians of blocks.
    """
    pooled: dict[tuple[Any, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in rows_R])
    for same in zip(*rows_R, strict=True):
        for rank, row in enumerate(same):
            pooled[(row["kind"], *row["keys"].items())][rank] += row["samples"]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (kind, *keys), samples_R in pooled.items():
        row = dict(keys)
        single = kind in REHEARSED or (kind == "grouped_gemm" and "moe_dtype" not in row)
        middle = np.mean if single else np.median
        if single:
            row |= _model_columns(kind, shape)
        samples = np.concatenate([np.array(samples) for samples in samples_R])
        p10, first, median, third, p90 = np.percentile(samples, [10, 25, 50, 75, 90]).tolist()
        latency = float(np.mean([middle(samples) for samples in samples_R]))
        facts = {"spread": (third - first) / median, "p10_s": p10, "p90_s": p90, "samples": len(samples)}
        found[kind].append({**row, "latency_s": latency, **facts})
    if "exchange" in found:
        found[EXCHANGE] = exchange_rows(found.pop("exchange"))
    return dict(found)


def _model_columns(kind: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that say which model a rehearsed row is of."""
    if kind == "stage" or not shape:
        return dict(shape)
    if kind == "exchange":
        return {name: shape[name] for name in ("hidden_size", "num_topk", "num_experts")}
    return {"moe_dtype": shape["dtype"], "hidden_size": shape["hidden_size"], "inter_size": shape["inter_size"]}


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance(machine: Mapping[str, Any]) -> str:
    """Return where the numbers come from, in one line for people."""
    what = machine.get("gpu") or machine["cpu"]
    count = f"{machine['ranks']} ranks of {machine['threads']} threads at once on {machine['cores']} cores"
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    governor = f", governor {machine['governor']}" if "governor" in machine else ""
    return (
        f"Measured {machine['date']} by moesim calibrate {machine['moesim']} on {what} ({machine['system']}{governor}): {count}, "
        f"torch {machine['torch']}{cuda}, Python {machine['python']}, sizes {machine['sizes']}, layers {machine['layers']}, "
        f"load average before {machine['load_before']}"
        + (f", {machine['others_cores']} cores busy with other work meanwhile" if machine.get("others_cores") is not None else "")
    )


def _busy_s() -> float | None:
    """Return the core-seconds that this machine has spent since its start on anything but this process's children; None where it does not say."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    used = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for disks
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used / os.sysconf("SC_CLK_TCK") - mine.ru_utime - mine.ru_stime


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
