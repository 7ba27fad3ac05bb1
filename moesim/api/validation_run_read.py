"""A recorded serving run, read: requests.jsonl and meta.json of its folder in, requests, degrees and limits in one spelling out.

Recorders spell degrees differently (`data_parallel_size`, `dp_size`, `dp` …) and put them under engine_kwargs or beside it; newer ones add what the engine
made of them (`resolved_config`), which fills what was not given. A row that cannot be a request is left out with its reason, it never stops the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.api.engines import is_overlapped
from moesim.errors import InputError, MoesimError, describe
from moesim.files import parse_json, read_bytes, read_json
from moesim.traces.requests.document import Request, check_request

_LIMIT = 1 << 28
ALIASES = {
    "tensor_parallel_size": ("tensor_parallel", "tp_size", "tp"),
    "data_parallel_size": ("data_parallel", "dp_size", "dp"),
    "pipeline_parallel_size": ("pipeline_parallel", "pp_size", "pp"),
    "enable_expert_parallel": ("expert_parallel_size", "expert_parallel", "ep_size", "ep"),
}
"""The engine's argument → other spellings of it."""
_WHOLE = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size")
_RESOLVED = {
    "parallel_config": ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "all2all_backend"),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling"),
    "cache_config": ("block_size", "gpu_memory_utilization", "enable_prefix_caching"),
    "model_config": ("max_model_len", "quantization"),
}
"""Group of resolved_config → arguments that it settles."""
_CACHE = ("block_size", "gpu_memory_utilization", "enable_prefix_caching")
_STAMPS = ("queued_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recorded run."""

    place: Path
    engine: Mapping[str, Any]
    """Arguments of the engine under their own names, whatever meta.json calls them."""
    blocks: int | None
    """KV blocks of an attention replica, where meta.json says."""
    requests: tuple[Request, ...]
    """In order of arrival."""
    measured: Mapping[str, tuple[float, float, float]]
    """Request id → queued_ts, first_token_ts, last_token_ts."""
    excluded: Mapping[str, int]
    """Reason → rows that are not scored."""
    first_excluded: str = ""
    """The first row that is no request, and why."""

    @property
    def dp(self) -> int:
        """Attention replicas."""
        return int(self.engine.get("data_parallel_size") or 1)


def shipped_runs() -> dict[str, Path]:
    """Return the runs of the package by name."""
    folder = Path(__file__).parent / "runs"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "meta.json").is_file()}


def read_run(ref: str | Path) -> Run:
    """Read a run by the path of its folder or its shipped name. Raises InputError if a file is missing or breaks a rule."""
    folder = Path(ref)
    if not folder.is_dir():
        shipped = shipped_runs()
        if str(ref) not in shipped:
            raise InputError(f"{ref}: is neither a folder with requests.jsonl and meta.json nor a shipped run; shipped: {', '.join(shipped)}")
        folder = shipped[str(ref)]
    engine, blocks = _engine(folder / "meta.json")
    place = folder / "requests.jsonl"
    rows: list[tuple[float, str, int, int]] = []
    measured: dict[str, tuple[float, float, float]] = {}
    excluded = {"impossible row": 0, "no measured times": 0}
    why, seen = "", set[str]()
    for number, line in enumerate(read_bytes(place, limit=_LIMIT).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{place}: line {number}"
        try:
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise InputError(f"{where}: must be a JSON object, one request")
            at, prompt, output = _number(where, row, "arrival_time"), _count(where, row, "input_toks"), _count(where, row, "output_toks")
            check_request(where, at, prompt, output)
            name = str(row.get("request_id", number))
            if name in seen:
                raise InputError(describe(where, "request_id", name[:80], "must be its own: an earlier row has it"))
        except MoesimError as cause:
            excluded["impossible row"] += 1
            why = why or str(cause)
            continue
        seen.add(name)
        rows.append((at, name, prompt, output))
        times = [float(one) for key in _STAMPS if isinstance(one := row.get(key), int | float) and not isinstance(one, bool)]
        if len(times) == 3 and times[0] < times[1] <= times[2] < float("inf"):
            measured[name] = (times[0], times[1], times[2])
        else:
            excluded["no measured times"] += 1
    if not rows:
        raise InputError(f"{place}: holds no request" + (f"; the first row: {why}" if why else "; it is empty"))
    if not measured:
        raise InputError(f"{place}: no request has queued_ts, first_token_ts and last_token_ts; there is nothing to compare with")
    rows.sort()
    first = rows[0][0]
    return Run(
        place=folder,
        engine=engine,
        blocks=blocks,
        requests=tuple(Request(name, at - first, prompt, output) for at, name, prompt, output in rows),
        measured=measured,
        excluded={key: count for key, count in excluded.items() if count},
        first_excluded=why,
    )


def _number(place: str, row: Mapping[str, Any], key: str) -> float:
    if key not in row:
        raise InputError(f"{place}: {key} is missing; a request has arrival_time, input_toks, output_toks and the measured time stamps")
    value = row[key]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise InputError(describe(place, key, value, "must be a number")) from None


def _count(place: str, row: Mapping[str, Any], key: str) -> int:
    value = _number(place, row, key)
    if not value.is_integer():
        raise InputError(describe(place, key, row[key], "must be a whole number"))
    return int(value)


# --- meta.json ----------------------------------------------------------------------------------------------------


def _engine(place: Path) -> tuple[dict[str, Any], int | None]:
    """Return the arguments of the engine in one spelling, and the KV blocks of a replica."""
    meta = read_json(place)
    given = meta.get("engine_kwargs") if isinstance(meta, dict) else None
    if not isinstance(given, dict):
        raise InputError(f"{place}: engine_kwargs is missing; it holds the degrees and limits of the engine")
    cache, resolved = _group(meta, "kv_cache"), _group(meta, "resolved_config")
    engine = dict(given)
    for name, others in ALIASES.items():
        stated = {key: node[key] for node in (meta, given) for key in (name, *others) if node.get(key) is not None}
        for key in others:
            engine.pop(key, None)
        values = {key: _degree(f"{place}: engine_kwargs", key, value, whole=name in _WHOLE) for key, value in stated.items()}
        if len(set(values.values())) > 1:
            raise InputError(describe(str(place), " and ".join(values), list(stated.values()), "must agree: they name one degree"))
        if values:
            engine[name] = next(iter(values.values()))
    for source, names in ((cache, _CACHE), *((_group(resolved, group), names) for group, names in _RESOLVED.items())):
        for name in names:
            if engine.get(name) is None and source.get(name) is not None:
                engine[name] = source[name]
    if engine.get("model") is None and isinstance(meta.get("model"), str):
        engine["model"] = meta["model"]
    if engine.get("async_scheduling") is None and isinstance(meta.get("vllm_version"), str):
        engine["async_scheduling"] = is_overlapped("vllm", meta["vllm_version"])
    return engine, _blocks(cache, _group(resolved, "cache_config"), engine)


def _group(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = node.get(key)
    return found if isinstance(found, dict) else {}


def _degree(place: str, key: str, value: Any, *, whole: bool) -> int | bool:
    """Return a degree; that of the experts may be a flag, as engines have one that spreads them over all ranks."""
    if not whole and isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if type(value) is not int or not 1 <= value <= 65536:
        raise InputError(describe(place, key, value, "must be an integer in 1..65536" + ("" if whole else ", or true or false")))
    return value


def _blocks(cache: Mapping[str, Any], settled: Mapping[str, Any], engine: Mapping[str, Any]) -> int | None:
    """Return the KV blocks of a replica: a recorder that asks the front end is told the sum over the data-parallel replicas."""
    own, size = settled.get("kv_cache_size_tokens"), engine.get("block_size")
    if type(own) is int and type(size) is int and own >= size > 0:
        return own // size
    every, dp = cache.get("num_gpu_blocks"), engine.get("data_parallel_size") or 1
    return every // dp if type(every) is int and every >= dp else None
