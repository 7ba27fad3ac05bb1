"""From one row of a file to one request, format by format.

Azure: CSV of time stamps (UTC); Vidur and BurstGPT: CSV in seconds; Mooncake: JSON lines in ms with
ids of 512-token blocks; LLMServingSim: JSON lines in ns, with token ids (hashed by blocks of 16) and sessions; `run`: what a benchmark recorded.
Rows of any format without an answer are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moesim.errors import TraceError, describe
from moesim.traces.requests.document import MAX_CHAIN, Request, check_request

Row = Mapping[str, Any]
MOONCAKE_BLOCK = 512
NO_ANSWER = "no answer (0 tokens)"
TOKEN_BLOCK = 16
"""Tokens per block where ids are made from token ids: the default of serving engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file: how its rows are told, and read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[str, str, Row, dict[str, float]], Request | str]
    """(place, id, row, memory of the pass) → the request, or why the row is left out."""
    block_tokens: int = 0


def _whole(place: str, row: Row, key: str) -> int:
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = float(value) if not value.strip().lstrip("+-").isdecimal() else int(value)
        except ValueError:
            raise TraceError(describe(place, key, value, "must be a whole number")) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        raise TraceError(describe(place, key, value, "must be a whole number"))
    return int(value)


def _number(place: str, row: Row, key: str) -> float:
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise TraceError(describe(place, key, value, "must be a number")) from None


def _request(place: str, name: str, arrival_s: float, prompt: int, output: int, **more: Any) -> Request:
    check_request(place, arrival_s, prompt, output)
    return Request(name, arrival_s, prompt, output, **more)


def _answered(place: str, name: str, arrival_s: float, prompt: int, output: int, **more: Any) -> Request | str:
    """Return the request; of one that was cut off before its first token, why it is left out."""
    return NO_ANSWER if output == 0 else _request(place, name, arrival_s, prompt, output, **more)


def _azure(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    text = str(row["TIMESTAMP"]).strip()
    try:
        stamp = datetime.fromisoformat(text)
    except ValueError:
        raise TraceError(describe(place, "TIMESTAMP", text, "must be a time stamp like 2023-11-16 18:15:46.6805900")) from None
    at = (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
    first = memory.setdefault("first", at)
    if at < first:
        raise TraceError(describe(place, "TIMESTAMP", text, "must not be before the first row's", "sort by time"))
    return _answered(place, name, at - first, _whole(place, row, "ContextTokens"), _whole(place, row, "GeneratedTokens"))


def _vidur(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    return _answered(place, name, _number(place, row, "arrived_at"), _whole(place, row, "num_prefill_tokens"), _whole(place, row, "num_decode_tokens"))


def _burstgpt(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    prompt, output = _whole(place, row, "Request tokens"), _whole(place, row, "Response tokens")
    arrival = _number(place, row, "Timestamp")
    if prompt == 0:
        return NO_ANSWER
    return _answered(place, name, arrival, prompt, output)


def _mooncake(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    prompt = _whole(place, row, "input_length")
    ids = row.get("hash_ids") or []
    if not isinstance(ids, list) or any(type(one) is not int for one in ids):
        raise TraceError(describe(place, "hash_ids", ids, "must be a list of integers"))
    if len(ids) > -(-prompt // MOONCAKE_BLOCK):
        raise TraceError(describe(place, "hash_ids", f"{len(ids)} ids", f"must be at most one per {MOONCAKE_BLOCK} of the {prompt} prompt tokens"))
    # The last block is shared only if it is full.
    blocks = tuple(ids[: prompt // MOONCAKE_BLOCK])
    return _answered(place, name, _number(place, row, "timestamp") * 1e-3, prompt, _whole(place, row, "output_length"), blocks=blocks)


def _token_blocks(place: str, row: Row, prompt: int) -> tuple[int, ...]:
    ids = row.get("input_tok_ids")
    if not ids:
        return ()
    if not isinstance(ids, list) or len(ids) != prompt or any(type(one) is not int for one in ids):
        raise TraceError(describe(place, "input_tok_ids", ids, f"must be a list of {prompt} integers"))
    blocks, before = [], 0
    for start in range(0, prompt - TOKEN_BLOCK + 1, TOKEN_BLOCK):
        before = hash((before, *ids[start : start + TOKEN_BLOCK]))
        blocks.append(before)
    return tuple(blocks)


_SUB_KEYS = {"input_toks", "output_toks", "tool_duration_ns", "input_tok_ids", "output_tok_ids"}


def _llmservingsim(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    arrival = _number(place, row, "arrival_time_ns") * 1e-9
    chain = row.get("sub_requests")
    if chain is None:
        prompt = _whole(place, row, "input_toks")
        return _answered(place, name, arrival, prompt, _whole(place, row, "output_toks"), blocks=_token_blocks(place, row, prompt))
    if not isinstance(chain, list) or not 1 <= len(chain) <= MAX_CHAIN or not all(isinstance(one, dict) for one in chain):
        raise TraceError(describe(place, "sub_requests", chain, f"must be a list of 1..{MAX_CHAIN} objects"))
    label, after = str(row.get("session_id", name))[:200], None
    for index in range(len(chain) - 1, -1, -1):
        part, where = chain[index], f"{place}: sub_requests[{index}]"
        unknown = sorted(set(part) - _SUB_KEYS)
        if unknown:
            raise TraceError(describe(where, "key", unknown[0], f"is not known; known: {', '.join(sorted(_SUB_KEYS))}"))
        prompt, pause = _whole(where, part, "input_toks"), _number(where, {"tool_duration_ns": 0, **part}, "tool_duration_ns") * 1e-9
        if not 0 <= pause < 1e9:
            raise TraceError(describe(where, "tool_duration_ns", part.get("tool_duration_ns"), "must be >= 0 and below 1e18"))
        at = arrival if index == 0 else 0.0
        after = _request(
            where, f"{label}/{index}", at, prompt, _whole(where, part, "output_toks"), blocks=_token_blocks(where, part, prompt), then=after, pause_s=pause
        )
    assert after is not None
    return after


def _run(place: str, name: str, row: Row, memory: dict[str, float]) -> Request | str:
    at = _number(place, row, "arrival_time")
    first = memory.setdefault("first", at)
    if at < first:
        raise TraceError(describe(place, "arrival_time", at, "must not be before the first row's", "sort by arrival"))
    return _answered(place, str(row.get("request_id", name))[:200], at - first, _whole(place, row, "input_toks"), _whole(place, row, "output_toks"))


CSV_FORMATS = (
    Format(name="azure", required=("TIMESTAMP", "ContextTokens", "GeneratedTokens"), optional=(), parse=_azure),
    Format(
        name="vidur",
        required=("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
        optional=("", "Unnamed: 0", "num_total_tokens", "pd_ratio"),
        parse=_vidur,
    ),
    Format(
        name="burstgpt",
        required=("Timestamp", "Request tokens", "Response tokens"),
        optional=("Model", "Total tokens", "Log Type", "Session ID", "Elapsed time"),
        parse=_burstgpt,
    ),
)
JSON_FORMATS = (
    Format(name="mooncake", required=("timestamp", "input_length", "output_length"), optional=("hash_ids",), parse=_mooncake, block_tokens=MOONCAKE_BLOCK),
    Format(
        name="run",
        required=("arrival_time", "input_toks", "output_toks"),
        optional=("request_id", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"),
        parse=_run,
    ),
    Format(
        name="llmservingsim",
        required=("arrival_time_ns",),
        optional=("input_toks", "output_toks", "input_tok_ids", "output_tok_ids", "session_id", "sub_requests"),
        parse=_llmservingsim,
        block_tokens=TOKEN_BLOCK,
    ),
)
