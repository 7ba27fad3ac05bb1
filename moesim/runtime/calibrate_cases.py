"""What `moesim calibrate` times: one case per row of a measured table, as a function that does the work once.

Operators are executed as the runtime executes them: eager torch, one expert after another, attention as softmax(QKᵀ)V with its cache. Keys are the columns
that the cost model looks rows up by. Shapes: T tokens, H hidden, F expert width, B sequences, S KV length, d head size, A experts that have tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, silu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLLECTIVES = ("alltoall", "all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to measure."""

    kind: str
    """Table that the row goes to."""
    keys: Mapping[str, Any]
    run: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes to measure."""

    dtypes: Sequence[str]
    gemm: Sequence[tuple[int, int]]
    """(n, k)."""
    tokens: Sequence[int]
    experts: Sequence[tuple[int, int]]
    """(hidden, expert width)."""
    active: Sequence[int]
    tokens_per_expert: Sequence[int]
    heads: Sequence[tuple[int, int, int]]
    """(query heads, KV heads, head size)."""
    batches: Sequence[int]
    lengths: Sequence[int]
    norms: Sequence[int]
    """Hidden sizes."""
    vocab: int
    stream_bytes: int
    messages: Sequence[int]
    """Bytes of the full buffer of a collective."""
    copies: Sequence[int]
    """Bytes of copies between host and device."""
    exchange: tuple[int, int, int]
    """Hidden size, top-k, experts of the expert exchange."""


def general(quick: bool, ranks: int) -> Grid:
    """Return sizes that cover small and middling models."""
    wide = (64, 256, 1024) if quick else (64, 256, 1024, 4096)
    return Grid(
        dtypes=("float32",) if quick else ("float32", "bfloat16"),
        gemm=[(n, k) for n in wide for k in wide],
        tokens=(1, 8, 64, 256) if quick else (1, 4, 16, 64, 256, 1024),
        experts=((64, 32), (256, 128), (1024, 512)) if quick else ((64, 32), (256, 128), (1024, 512), (2048, 1024)),
        active=(1, 4, 16) if quick else (1, 2, 8, 32),
        tokens_per_expert=(1, 8, 64) if quick else (1, 4, 16, 64, 256),
        heads=((4, 2, 16), (16, 4, 64)) if quick else ((4, 2, 16), (8, 2, 64), (16, 4, 64), (32, 8, 128)),
        batches=(1, 8) if quick else (1, 4, 16),
        lengths=(16, 128) if quick else (16, 64, 256, 1024),
        norms=(64, 1024) if quick else (64, 256, 1024, 4096),
        vocab=32000,
        stream_bytes=(64 if quick else 256) << 20,
        messages=tuple(1 << power for power in ((10, 13, 16, 19, 22) if quick else range(8, 27, 2))),
        copies=tuple(1 << power for power in range(12, 29, 4)),
        exchange=(256, 4, 32 * ranks),
    )


def of_model(model: Any, quick: bool, ranks: int) -> Grid:
    """Return the sizes that `model` (a MoEModel) has on `ranks` expert-parallel ranks; nothing of any run enters."""
    base, attention, hidden = general(quick, ranks), model.attention, model.hidden_size
    heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
    products = [((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size), (model.num_experts, hidden), (model.vocab_size, hidden)]
    products += [(2 * width, hidden) for width in (model.shared_ffn_size, model.dense_ffn_size) if width]
    products += [(hidden, width) for width in (model.shared_ffn_size, model.dense_ffn_size) if width]
    local = max(-(-model.num_experts // ranks), 2)
    active = sorted({1, 2, max(local // 2, 1), local})
    return Grid(
        dtypes=(model.dtype if model.dtype in DTYPES else "float32",), gemm=list(dict.fromkeys(products)), tokens=(1, 4, 8, 16, 32, 64, 128, 256, 512),
        experts=((hidden, model.expert_ffn_size),), active=active, tokens_per_expert=(1, 2, 4, 8, 16, 32, 128), heads=((heads, kv_heads, size),),
        batches=(1, 4, 8, 16), lengths=(8, 16, 32, 64, 128), norms=(hidden,), vocab=model.vocab_size, stream_bytes=base.stream_bytes, messages=base.messages,
        copies=base.copies, exchange=(hidden, model.top_k, model.num_experts),
    )  # fmt: skip


def kernels(grid: Grid, device: torch.device) -> Iterator[Case]:
    """Yield the cases that a rank computes by itself; tensors are made when a case is reached."""
    for name in grid.dtypes:
        dtype = DTYPES[name]
        make = _maker(device, dtype)
        for n, k in grid.gemm:
            weight = make(n, k)
            for m in grid.tokens:
                rows = make(m, k)
                keys = {"gemm_dtype": name, "m": m, "n": n, "k": k}
                yield Case(kind="gemm", keys=keys, run=partial(linear, rows, weight))
        for hidden, width in grid.experts:
            for active in grid.active:
                up, down = make(active, 2 * width, hidden), make(active, hidden, width)
                for each in grid.tokens_per_expert:
                    rows = make(active * each, hidden)
                    keys = {"moe_dtype": name, "hidden_size": hidden, "inter_size": width, "slots": active, "active": active, "assignments": active * each}
                    yield Case(kind="grouped_gemm", keys=keys, run=partial(_experts, rows, up, down, each))
        for shape in grid.heads:
            yield from _attention(grid, name, shape, make)
        for hidden in grid.norms:
            weight = make(hidden)
            for tokens in grid.tokens:
                rows = make(tokens, hidden)
                moved = 3 * tokens * hidden * dtype.itemsize
                keys = {"operator": "rms_norm", "tokens": tokens, "moved_bytes": moved}
                yield Case(kind="stream", keys=keys, run=partial(_norm, rows, weight))
    make = _maker(device, torch.float32)
    source = make(grid.stream_bytes // 4)
    target = torch.empty_like(source)
    yield Case(kind="stream", keys={"operator": "copy", "tokens": 1, "moved_bytes": 2 * grid.stream_bytes}, run=partial(target.copy_, source))
    yield Case(kind="memory", keys={"operator": "read", "moved_bytes": grid.stream_bytes}, run=source.sum)
    yield Case(kind="memory", keys={"operator": "write", "moved_bytes": grid.stream_bytes}, run=partial(target.fill_, 1.0))
    one = make(8)
    yield Case(kind="launch", keys={"operator": "add"}, run=partial(torch.add, one, one))
    for sequences in (1, 8, 64):
        logits = make(sequences, grid.vocab)
        yield Case(kind="sampler", keys={"sequences": sequences, "vocab": grid.vocab}, run=partial(logits.argmax, -1))
    if device.type == "cuda":
        for size in grid.copies:
            host, there = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device=device)
            yield Case(kind="copy", keys={"operator": "to_device", "moved_bytes": size}, run=partial(there.copy_, host, non_blocking=True))
            yield Case(kind="copy", keys={"operator": "to_host", "moved_bytes": size}, run=partial(host.copy_, there, non_blocking=True))


def collectives(grid: Grid, group: Any, rank: int, size: int, device: torch.device) -> Iterator[Case]:
    """Yield the collectives over all ranks; `message_bytes` is the full buffer of a rank, as NCCL's tests count."""
    import torch.distributed as dist

    for nbytes in grid.messages:
        count = max(nbytes // 2 // size, 1) * size
        full, again = (torch.zeros(count, dtype=torch.float16, device=device) for _ in range(2))
        mine = full[: count // size].clone()
        calls: dict[str, Callable[[], Any]] = {
            "alltoall": partial(group.alltoall_base, again, full, [], []),
            "all_reduce": partial(group.allreduce, [full]),
            "all_gather": partial(group._allgather_base, full, mine),
            "reduce_scatter": partial(group._reduce_scatter_base, mine, full, dist.ReduceScatterOptions()),
        }
        for name in COLLECTIVES:
            keys = {"op_name": name, "nccl_dtype": "half", "num_gpus": size, "message_size": count, "message_bytes": 2 * count}
            yield Case(kind="nccl", keys=keys, run=partial(_awaited, calls[name]))
        keys = {"op_name": "send_recv", "num_nodes": 1, "num_gpus": size, "message_bytes": 2 * count}
        yield Case(kind="collective", keys=keys, run=partial(_ring, group, full, again, rank, size))


def exchanges(grid: Grid, group: Any, rank: int, size: int, device: torch.device) -> Iterator[Case]:
    """Yield dispatch and combine as the runtime does them: rows sorted by expert, counts exchanged, one row per (token, expert), summed in the order of k.

    Routing is uniform; `up_bytes` is what a rank sends to others.
    """
    hidden, top_k, experts = grid.exchange
    if experts % size or top_k > experts:
        return
    generator = torch.Generator().manual_seed(rank)
    dtype = DTYPES[grid.dtypes[0]]
    for tokens in grid.tokens:
        ids = torch.rand((tokens, experts), generator=generator).topk(top_k).indices.to(device)
        rows, weights = torch.rand((tokens, hidden), generator=generator).to(device, dtype), torch.rand((tokens, top_k), generator=generator).to(device)
        one = _Exchange(group, size, experts, ids)
        back = one.dispatch(rows)
        keys = {"hidden_size": hidden, "num_topk": top_k, "num_experts": experts, "tokens": tokens}
        keys["up_bytes"] = tokens * top_k * (size - 1) // size * hidden * dtype.itemsize
        yield Case(kind="exchange", keys={**keys, "stage": "dispatch"}, run=partial(one.dispatch, rows))
        yield Case(kind="exchange", keys={**keys, "stage": "combine"}, run=partial(one.combine, back, weights))


class _Exchange:
    """One layer's exchange of a rank."""

    def __init__(self, group: Any, size: int, experts: int, ids_Nk: torch.Tensor) -> None:
        self._group, self._size, self._experts, self._ids_Nk = group, size, experts, ids_Nk

    def dispatch(self, rows: torch.Tensor) -> torch.Tensor:
        flat, size = self._ids_Nk.reshape(-1), self._size
        self._order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self._experts).view(size, -1)
        arriving = torch.empty_like(counts)
        self._group.alltoall_base(arriving, counts, [], []).wait()
        self._send, self._receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        sent = rows[self._order // self._ids_Nk.shape[1]]
        result = sent.new_empty((sum(self._receive), sent.shape[1]))
        self._group.alltoall_base(result, sent, self._receive, self._send).wait()
        slot = torch.arange(arriving.shape[1], device=rows.device).repeat(size).repeat_interleave(arriving.reshape(-1))
        regroup = torch.argsort(slot, stable=True)
        self._back = torch.empty_like(regroup)
        self._back[regroup] = torch.arange(regroup.numel(), device=rows.device)
        return result[regroup]

    def combine(self, rows: torch.Tensor, weights_Nk: torch.Tensor) -> torch.Tensor:
        sent = rows[self._back]
        result = sent.new_empty((sum(self._send), sent.shape[1]))
        self._group.alltoall_base(result, sent, self._send, self._receive).wait()
        inverse = torch.empty_like(self._order)
        inverse[self._order] = torch.arange(inverse.numel(), device=rows.device)
        tokens, top_k = weights_Nk.shape
        result_NkH = result[inverse].view(tokens, top_k, -1)
        total = result_NkH[:, 0].float() * weights_Nk[:, 0, None].float()
        for choice in range(1, top_k):
            total = total + result_NkH[:, choice].float() * weights_Nk[:, choice, None].float()
        return total.to(rows.dtype)


def _ring(group: Any, outgoing: torch.Tensor, incoming: torch.Tensor, rank: int, size: int) -> None:
    """Send to the next rank and receive from the one before, in an order in which nobody waits for ever."""
    send = partial(group.send, [outgoing], (rank + 1) % size, 0)
    receive = partial(group.recv, [incoming], (rank - 1) % size, 0)
    for start in (receive, send) if rank % 2 else (send, receive):
        start().wait()


def _awaited(start: Callable[[], Any]) -> None:
    start().wait()


def _maker(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.rand(shape, generator=generator).mul_(0.1).to(device=device, dtype=dtype)


def _experts(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, each: int) -> torch.Tensor:
    parts = []
    for index, part in enumerate(rows.split(each)):
        gate, value = linear(part, up[index]).chunk(2, -1)
        parts.append(linear(silu(gate) * value, down[index]))
    return torch.cat(parts)


def _norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = rows.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(rows.dtype)


def _attention(grid: Grid, name: str, shape: tuple[int, int, int], make: Callable[..., torch.Tensor]) -> Iterator[Case]:
    heads, kv_heads, size = shape
    fixed = {"num_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "window_size": 0, "kv_cache_dtype": name, "attn_dtype": name, "prefix": 0}
    for batch in grid.batches:
        for length in grid.lengths:
            query, new = make(batch, heads, length, size), make(batch, kv_heads, length, size)
            mask = make(1, 1, length, length)
            keys = {**fixed, "batch_size": batch, "isl": length}
            yield Case(kind="attn_context", keys=keys, run=partial(_attend, query, None, new, mask))
            token, held = make(batch, heads, 1, size), make(batch, kv_heads, length, size)
            keys = {**fixed, "batch_size": batch, "step": length}
            yield Case(kind="attn_generation", keys=keys, run=partial(_attend, token, held, new[:, :, :1], None))


def _attend(query: torch.Tensor, held: torch.Tensor | None, new: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    groups = query.shape[1] // new.shape[1]
    key, value = (new if held is None else torch.cat([held, new], 2) for _ in range(2))
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return (torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).contiguous()
