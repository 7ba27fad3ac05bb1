"""Speed of compiling routing into rank-pair loads, in (token, layer, expert) entries per second on one core.

    python benchmarks/bench_compile.py [--repeat 5] [--quick] [--json]

Every shape is run beside a straightforward numpy version (`np.unique` and `np.add.at`) on its first tokens, whose loads
must be equal. Routing is drawn from a Zipf(0.6) law per layer without repeats in a token; times are the best CPU time of
`--repeat` runs (everything is single-threaded, so that is the time of one core, whatever else runs beside it).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np

from moesim.plan import Plan, linear
from moesim.sim._masks import phases_T, slot_of_LEP
from moesim.sim.loads import LoadCompiler
from moesim.sim.pairs import PairCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    layers: int
    experts: int
    top_k: int
    ranks: int
    tokens_per_rank: int
    passes: int = 1
    redundant: int = 0
    dropped: float = 0.0


V3 = {"layers": 58, "experts": 256, "top_k": 8, "ranks": 32}
SHAPES = (
    Shape(name="DeepSeek-V3 prefill", **V3, tokens_per_rank=4096),
    Shape(name="DeepSeek-V3 prefill, 32 redundant", **V3, tokens_per_rank=4096, redundant=32),
    Shape(name="DeepSeek-V3 prefill, 10 % dropped", **V3, tokens_per_rank=1024, dropped=0.1),
    Shape(name="DeepSeek-V3 decode 128/rank", **V3, tokens_per_rank=128, passes=64),
    Shape(name="DeepSeek-V3 decode 128/rank, 32 redundant", **V3, tokens_per_rank=128, passes=64, redundant=32),
    Shape(name="DeepSeek-V3 decode 8/rank", **V3, tokens_per_rank=8, passes=256),
    Shape(name="DeepSeek-V3 one step, 8/rank", **V3, tokens_per_rank=8),
    Shape(name="DeepSeek-V3 prefill, 144 ranks", layers=58, experts=256, top_k=8, ranks=144, tokens_per_rank=512, redundant=32),
    Shape(name="Mixtral prefill", layers=32, experts=8, top_k=2, ranks=8, tokens_per_rank=16384),
    Shape(name="FLAME-MoE-290M prefill", layers=8, experts=64, top_k=6, ranks=8, tokens_per_rank=16384),
)


def routing(shape: Shape, seed: int) -> np.ndarray:
    """Return uint8 [T, L, K] with distinct experts per token and layer, T tokens over all passes."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tokens = shape.passes * shape.ranks * shape.tokens_per_rank
    result = np.empty((tokens, shape.layers, shape.top_k), np.uint8)
    weight = -0.6 * np.log(np.arange(1, shape.experts + 1))
    for layer in range(shape.layers):
        score = rng.permutation(weight) + rng.gumbel(size=(2048, shape.experts))
        bank = np.argpartition(-score, shape.top_k - 1, axis=1)[:, : shape.top_k].astype(np.uint8)
        result[:, layer] = bank[rng.integers(0, bank.shape[0], tokens)]
    return result


def placement(shape: Shape, seed: int) -> Plan:
    """Return a random placement, with `redundant` replicas of random experts in every layer."""
    if not shape.redundant:
        return linear(model=shape.name, num_experts=shape.experts, moe_layer_ids=range(shape.layers), num_ranks=shape.ranks, kind="random", seed=seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    slots = shape.experts + shape.redundant
    rows = [rng.permutation(np.append(np.arange(shape.experts), rng.integers(0, shape.experts, shape.redundant))) for _ in range(shape.layers)]
    owner = np.sort(np.arange(slots) % shape.ranks)
    ids = tuple(range(shape.layers))
    return Plan(model=shape.name, num_experts=shape.experts, moe_layer_ids=ids, slot_to_expert_LS=np.stack(rows), slot_rank_S=owner, num_ranks=shape.ranks)


def plain(
    slot_LEP: np.ndarray, plan: Plan, experts_TLK: np.ndarray, rank_T: np.ndarray, valid_TLK: np.ndarray | None, ranks_per_node: int
) -> tuple[np.ndarray, ...]:
    """Compile one pass the obvious way: look up every choice, count with `np.add.at`, deduplicate with `np.unique`."""
    tokens, layers, top_k = experts_TLK.shape
    ranks, nodes = plan.num_ranks, -(-plan.num_ranks // ranks_per_node)
    index_T = (np.arange(tokens) - np.searchsorted(rank_T, rank_T)) * ranks + rank_T
    phase_T = phases_T(index_T)
    token = np.repeat(np.arange(tokens), top_k)
    slot_LS = np.zeros((layers, plan.num_slots), np.int64)
    assign, copy, node = np.zeros((layers, ranks, ranks), np.int32), np.zeros((layers, ranks, ranks), np.int32), np.zeros((layers, ranks, nodes), np.int32)
    for layer in range(layers):
        keep = slice(None) if valid_TLK is None else valid_TLK[:, layer].ravel()
        source = token[keep]
        slot = slot_LEP[layer][experts_TLK[:, layer].ravel()[keep], phase_T[source]]
        target = plan.slot_rank_S[slot]
        np.add.at(slot_LS[layer], slot, 1)
        np.add.at(assign[layer], (rank_T[source], target), 1)
        pair = np.unique(source * ranks + target)
        np.add.at(copy[layer], (rank_T[pair // ranks], pair % ranks), 1)
        pair = np.unique(source * nodes + target // ranks_per_node)
        np.add.at(node[layer], (rank_T[pair // nodes], pair % nodes), 1)
    return slot_LS, assign, copy, node


def measure(shape: Shape, *, repeat: int, quick: bool) -> dict[str, object]:
    """Time one shape; return its rates."""
    plan, ranks_per_node = placement(shape, 1), 8
    if quick:
        shape = Shape(**{**{f: getattr(shape, f) for f in Shape.__slots__}, "tokens_per_rank": min(shape.tokens_per_rank, 512), "passes": min(shape.passes, 8)})
    experts_TLK = routing(shape, 2)
    per_pass = shape.ranks * shape.tokens_per_rank
    rank_T = np.tile(np.repeat(np.arange(shape.ranks), shape.tokens_per_rank), shape.passes)
    starts_P = np.arange(shape.passes) * per_pass
    valid_TLK = None
    if shape.dropped:
        valid_TLK = np.random.Generator(np.random.PCG64(3)).random(experts_TLK.shape, dtype=np.float32) >= shape.dropped
    begin = time.process_time()
    compiler = LoadCompiler(plan, ranks_per_node=ranks_per_node)
    tables_s = time.process_time() - begin
    cpu_s = []
    for _ in range(repeat):
        begin = time.process_time()
        compiler.compile(experts_TLK=experts_TLK, rank_T=rank_T, valid_TLK=valid_TLK, pass_start_P=starts_P)
        cpu_s.append(time.process_time() - begin)
    # The plain version is slow: a few thousand tokens of whole passes, or a sample over all ranks of a long one.
    part = slice(0, per_pass) if per_pass <= 4096 else slice(0, per_pass, -(-per_pass // 4096))
    slot_LEP = slot_of_LEP(plan)
    sample, source, valid = np.ascontiguousarray(experts_TLK[part]), rank_T[part], None if valid_TLK is None else np.ascontiguousarray(valid_TLK[part])
    plain_s = []
    for _ in range(min(repeat, 3)):
        begin = time.process_time()
        expected = plain(slot_LEP, plan, sample, source, valid, ranks_per_node)
        plain_s.append(time.process_time() - begin)
    loads = compiler.compile(experts_TLK=sample, rank_T=source, valid_TLK=valid)
    pairs = loads.pairs
    assert isinstance(pairs, PairCounts)
    equal = all(np.array_equal(a, b[0]) for a, b in zip(expected, (loads.slot_PLS, pairs.assign_PLRR, pairs.copy_PLRR, pairs.node_PLRN), strict=True))
    rate, plain_rate = experts_TLK.size / min(cpu_s), sample.size / min(plain_s)
    return {
        "shape": shape.name,
        "entries": experts_TLK.size,
        "cpu_s": min(cpu_s),
        "entries_per_s": rate,
        "plain_entries_per_s": plain_rate,
        "ratio": rate / plain_rate,
        "tables_s": tables_s,
        "equal": equal,
    }


def reference_rate() -> float:
    """Return values per second that `np.bincount` counts here: how fast, and how disturbed, this core is (0.8 G/s on a quiet 2023 server)."""
    value = np.random.Generator(np.random.PCG64(0)).integers(0, 256, 1 << 15)
    best = np.inf
    for _ in range(50):
        begin = time.process_time()
        np.bincount(value, minlength=256)
        best = min(best, time.process_time() - begin)
    return value.size / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="at most 512 tokens a rank and 8 passes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    if not args.json:
        print(f"np.bincount on this core: {reference_rate() / 1e6:.0f} M values/s")
        print(f"{'shape':44s} {'entries':>12s} {'CPU':>9s} {'entries/s':>12s} {'plain numpy':>12s} {'ratio':>7s} {'tables':>8s}  equal")
    for shape in SHAPES:
        row = measure(shape, repeat=args.repeat, quick=args.quick)
        rows.append(row)
        if not args.json:
            print(
                f"{row['shape']:44s} {row['entries']:>12,d} {row['cpu_s'] * 1e3:>6.1f} ms {row['entries_per_s'] / 1e6:>10.1f} M "
                f"{row['plain_entries_per_s'] / 1e6:>10.1f} M {row['ratio']:>6.0f}x {row['tables_s'] * 1e3:>5.1f} ms  {row['equal']}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"schema": "moesim.bench-compile/1", "bincount_per_s": reference_rate(), "rows": rows}))


if __name__ == "__main__":
    main()
