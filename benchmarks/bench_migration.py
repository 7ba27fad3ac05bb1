"""How fast weights move: a migration's staging beside plain `batch_isend_irecv` of the same bytes between the same pairs, in turns in the same processes.

Four ranks joined by gloo on loopback. Staging is timed from when its own process group is connected, which is shown apart, to its return: it copies
within ranks, cuts the streams and checks every expert by its digest; the plain exchange sends ready tensors into ready tensors over a group that has been used
before. A round is as long as its slowest rank. Every pair of rounds gives one ratio; figures are medians, with the smallest and the largest.

    python benchmarks/bench_migration.py               # the ratio on this machine
    python benchmarks/bench_migration.py --load 50     # step times of a serving deployment before and during each of 50 migrations, and its pauses
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist

from moesim.plan import linear
from moesim.runtime.digest import digest
from moesim.runtime.migration import Migration, live_digests
from moesim.runtime.model import build_distributed
from moesim.runtime.moves import moves_between
from moesim.runtime.spec import ModelSpec
from moesim.runtime.staging import StagingMemory
from tests.runtime.ranks import run_ranks

RANKS = 4
TURNS = 7
SHAPES = {"experts of 0.2 MB": (64, 4, 128, 128), "experts of 3 MB": (16, 4, 512, 512), "experts of 25 MB": (8, 1, 1024, 2048)}
"""Name → experts, layers, hidden and expert width."""


def spec_of(experts: int, layers: int, hidden: int, width: int) -> ModelSpec:
    """Return a Mixtral of that shape, float32."""
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 64, "num_local_experts": experts, "num_experts_per_tok": 2, "pad_token_id": None,
    }  # fmt: skip
    return ModelSpec(name="bench", config=config)


def measure(rank: int, size: int, group: Any, spec: ModelSpec, folder: str) -> dict[str, Any]:
    """Return per turn the seconds of both on this rank, and the bytes that all ranks send."""
    layers = range(int(spec.config["num_hidden_layers"]))
    facts = {"model": "bench", "num_experts": int(spec.config["num_local_experts"]), "moe_layer_ids": tuple(layers), "num_ranks": size}
    old, new = linear(**facts), linear(**facts, kind="random", seed=1)
    _, held = build_distributed(spec, old, rank=rank, group=group)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=dist.PrefixStore("plain", store), rank=rank, world_size=size)
    moves = [(index, move) for index, move in enumerate(moves_between(old, new)) if move.source != move.target]
    nbytes = held[0].expert_bytes
    out = {index: torch.ones(nbytes, dtype=torch.uint8) for index, move in moves if move.source == rank}
    into = {index: torch.zeros(nbytes, dtype=torch.uint8) for index, move in moves if move.target == rank}

    def plain() -> None:
        operations = [dist.P2POp(dist.isend, out[index], move.target, tag=index) for index, move in moves if index in out]
        operations += [dist.P2POp(dist.irecv, into[index], move.source, tag=index) for index, move in moves if index in into]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    known = {(entry["row"], entry["slot"]): bytes.fromhex(entry["digest"]) for entry in live_digests(held)}
    seconds: dict[str, list[float]] = {"plain": [], "stage": [], "cpu plain": [], "cpu stage": []}
    connecting: list[float] = []
    memory = StagingMemory()
    for turn in range(TURNS + 1):
        for name in ("plain", "stage") if turn % 2 else ("stage", "plain"):
            migration, apart = Migration(held, old, new, rank=rank, memory=memory), dist.PrefixStore(f"p2p/{turn}", store)
            if name == "stage":
                begin = time.perf_counter()
                migration.connect(apart, "127.0.0.1")
                connecting.append(time.perf_counter() - begin)
            dist.barrier()
            begin, spent = time.perf_counter(), time.process_time()
            plain() if name == "plain" else migration.stage(apart, "127.0.0.1", known=known)
            spent = time.process_time() - spent
            dist.barrier()
            if turn:  # the first of both is the warm-up
                seconds[name].append(time.perf_counter() - begin)
                seconds[f"cpu {name}"].append(spent)
            migration.close()
    dist.destroy_process_group()
    return {"bytes": len(moves) * nbytes, "connecting": connecting, **seconds}


def spread(values: np.ndarray, form: str = ".2f") -> str:
    """Return median, smallest and largest."""
    return f"{np.median(values):{form}} ({values.min():{form}}..{values.max():{form}})"


def load(migrations: int) -> None:
    """Print step times of `serve-demo` on 4 ranks during migrations beside those of as many steps before each, the pauses, and the memory."""
    import tempfile

    from moesim.runtime import client
    from tests.runtime.live import Live, write_config

    with tempfile.TemporaryDirectory() as folder:
        widths = {"hidden_size": 256, "moe_intermediate_size": 512, "intermediate_size": 512, "num_experts": 16}
        live = Live(write_config(Path(folder) / "served", **widths), "--repeat", "1", "--decode", "15", "--answer-timeout", "120", "--timeout", "60")
        times: dict[str, list[float]] = {"before": [], "during": []}
        pauses, parts, staged, resident = [], [], [], []
        facts = {"model": "served", "num_experts": 16, "moe_layer_ids": (0, 1, 2), "num_ranks": RANKS}
        try:
            for seed in range(migrations):
                first = min(rank["step"] for rank in client.metrics(live.control)["rank_metrics"])
                report = client.apply_plan(live.control, linear(**facts, kind="random", seed=seed))
                last = min(rank["step"] for rank in client.metrics(live.control)["rank_metrics"])
                # an apply begins with a window of plain steps and ends with another; the staging lies between
                each = client.counts(live.control, max(first - 32, 0), last)["each_R"]
                steps_ms = np.max([rank["ms"] for rank in each], axis=0)
                times["before"] += steps_ms[:32].tolist()
                times["during"] += steps_ms[32:-32].tolist()
                pauses.append(report["pause_ms"])
                parts.append(report["pause_parts_ms"]["install_ms"])
                staged.append(report["stage_ms"])
                resident.append(sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in live.pids) * 4096 / 1e6)
            answers = {digest for rank in client.metrics(live.control)["rank_metrics"] for _, digest in rank["wave_digests"]}
        finally:
            live.close()
    moved_mb = report["moved"]["between_ranks"] / 1e6
    print(f"{migrations} migrations, {moved_mb:.1f} MB between ranks in the last; {len(answers)} different answers, to {RANKS} different requests")
    p99 = {name: float(np.percentile(values, 99)) for name, values in times.items()}
    print(f"step p99 {p99['before']:.1f} ms before ({len(times['before'])} steps), {p99['during']:.1f} ms during ({len(times['during'])}): ", end="")
    print(f"{p99['during'] / p99['before']:.2f} times; medians {np.median(times['before']):.1f} and {np.median(times['during']):.1f} ms")
    print(f"pause ms, p50 and p99: {np.percentile(pauses, [50, 99]).round(1).tolist()}, of which installing {np.percentile(parts, [50, 99]).round(1).tolist()}")
    print(f"staging ms {spread(np.array(staged), '.0f')}; memory of all ranks after every tenth: {[round(value) for value in resident[9::10]]} MB")


def main() -> None:
    """Print the table."""
    import tempfile

    data = np.random.Generator(np.random.PCG64(0)).integers(0, 256, 16 << 20, dtype=np.uint8)
    speed = {}
    for name, work in (("digest", lambda: digest(data)), ("copy", lambda: data.copy())):
        work()
        times = []
        for _ in range(7):
            begin = time.thread_time()
            work()
            times.append(time.thread_time() - begin)
        speed[name] = data.nbytes / min(times) / 1e9
    print(f"digest {speed['digest']:.1f} GB/s beside numpy's copy {speed['copy']:.1f} GB/s, one thread, 16 MiB")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            answers = run_ranks(RANKS, measure, spec_of(*shape), folder, timeout_s=300)
        total = answers[0]["bytes"]
        plain, stage = (np.max([answer[key] for answer in answers], axis=0) for key in ("plain", "stage"))
        cpu = [float(np.median(np.sum([answer[f"cpu {key}"] for answer in answers], axis=0))) / total * 1e9 for key in ("plain", "stage")]
        rates = f"{spread(total / plain / 1e9)} GB/s plain, {spread(total / stage / 1e9)} GB/s staged"
        print(f"{name}, {total / 1e6:.0f} MB: {rates}; ratio {spread(plain / stage)}; CPU ns/B {cpu[0]:.2f} and {cpu[1]:.2f}")
        print(f"    connecting before: {spread(1e3 * np.max([answer['connecting'] for answer in answers], axis=0), '.0f')} ms")


if __name__ == "__main__":
    load(int(sys.argv[2])) if sys.argv[1:2] == ["--load"] else main()
