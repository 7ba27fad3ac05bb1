"""Request traces: every format read as it means, every broken row named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from moesim.errors import TraceError
from moesim.traces.requests.document import Request
from moesim.traces.requests.open import library, open_requests


def rows(path: Path | str) -> list[Request]:
    return list(open_requests(path))


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_azure_time_stamps_become_seconds_from_the_first(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:16:50.995169+00:00,1,1",
    )
    found = rows(path)
    assert [(one.prompt_tokens, one.output_tokens) for one in found] == [(374, 44), (396, 109), (1, 1)]
    assert [one.arrival_s for one in found] == pytest.approx([0.0, 4.314579, 64.314579], abs=1e-6)
    assert open_requests(path).format == "azure"


def test_mooncake_shares_full_blocks_only(tmp_path: Path) -> None:
    line = {"timestamp": 27000, "input_length": 1100, "output_length": 52, "hash_ids": [5, 6, 9]}
    found = open_requests(write(tmp_path, "m.jsonl", json.dumps(line)))
    assert list(found) == [Request("1", 27.0, 1100, 52, (5, 6))]
    assert (found.format, found.block_tokens) == ("mooncake", 512)


def test_vidur_and_burstgpt_columns(tmp_path: Path) -> None:
    vidur = write(tmp_path, "v.csv", "arrived_at,num_prefill_tokens,num_decode_tokens", "0.25,10,20")
    assert rows(vidur) == [Request("2", 0.25, 10, 20)]
    burst = write(
        tmp_path, "b.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", "5,GPT-4,7,8,15,Conversation log", "6,GPT-4,7,0,7,API log"
    )
    found = open_requests(burst)
    assert list(found) == [Request("2", 5.0, 7, 8)] and found.excluded == {"no answer (0 tokens)": 1}
    assert list(found) == [Request("2", 5.0, 7, 8)] and found.excluded == {"no answer (0 tokens)": 1}


def test_token_ids_become_blocks_that_agree_as_far_as_the_prompts_do(tmp_path: Path) -> None:
    ids = list(range(40))
    other = [*range(20), *range(100, 120)]
    lines = [json.dumps({"input_toks": 40, "output_toks": 2, "arrival_time_ns": 10**9, "input_tok_ids": one}) for one in (ids, other, ids)]
    first, second, third = rows(write(tmp_path, "l.jsonl", *lines))
    assert len(first.blocks) == 2 and first.arrival_s == 1.0
    assert first.blocks == third.blocks
    assert first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]


def test_a_session_is_a_chain(tmp_path: Path) -> None:
    line = {
        "session_id": "s",
        "arrival_time_ns": 5 * 10**8,
        "sub_requests": [{"input_toks": 10, "output_toks": 3, "tool_duration_ns": 2 * 10**9}, {"input_toks": 20, "output_toks": 4, "tool_duration_ns": 0}],
    }
    assert rows(write(tmp_path, "s.jsonl", json.dumps(line))) == [Request("s/0", 0.5, 10, 3, (), Request("s/1", 0.0, 20, 4), 2.0)]


def test_a_recorded_run_is_a_request_trace(tmp_path: Path) -> None:
    lines = [json.dumps({"request_id": f"r{i}", "arrival_time": 1.7e9 + i, "input_toks": 5, "output_toks": 6, "queued_ts": 1.0}) for i in range(2)]
    assert rows(write(tmp_path, "r.jsonl", *lines)) == [Request("r0", 0.0, 5, 6), Request("r1", 1.0, 5, 6)]


@pytest.mark.parametrize(
    "lines",
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:00+00:00,9,0", "2024-05-10 00:00:01+00:00,9,3"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", "0,9,0", "1,9,3"),
        ("Timestamp,Request tokens,Response tokens", "0,9,0", "1,9,3"),
        ('{"timestamp": 0, "input_length": 9, "output_length": 0}', '{"timestamp": 1000, "input_length": 9, "output_length": 3}'),
        ('{"arrival_time_ns": 0, "input_toks": 9, "output_toks": 0}', '{"arrival_time_ns": 1000000000, "input_toks": 9, "output_toks": 3}'),
        ('{"arrival_time": 5, "input_toks": 9, "output_toks": 0}', '{"arrival_time": 6, "input_toks": 9, "output_toks": 3}'),
    ],
)
def test_a_request_that_was_cut_off_is_left_out_and_counted(tmp_path: Path, lines: tuple[str, ...]) -> None:
    requests = open_requests(write(tmp_path, "cut.txt", *lines))
    assert [(one.arrival_s, one.prompt_tokens, one.output_tokens) for one in requests] == [(1.0, 9, 3)]
    assert requests.excluded == {"no answer (0 tokens)": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("TIMESTAMP,ContextTokens", "x,1"), "are of no known request format .azure lacks GeneratedTokens"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens,mood", "1,2,3,4"), "column = 'mood' is not known"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,2"), "line 2: cells = 2 must be 3"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,2,3", "0.5,2,3"), "request 2 .3.: arrival = 0.5 s must be >= the arrival before it"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,-2,3"), "line 2: prompt tokens = -2 must be in 1"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,2,-1"), "line 2: output tokens = -1"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,2.5,3"), "num_prefill_tokens = 2.5 must be a whole number"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "nan,2,3"), "arrival = nan must be a number of seconds"),
        (("TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,1"), "TIMESTAMP = 'yesterday' must be a time stamp"),
        (("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,1,1", "2023-11-16 18:15:45,1,1"), "line 3: TIMESTAMP = .* must not be before"),
        (('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}',), "hash_ids = '2 ids' must be at most one per 512"),
        (('{"timestamp": 1, "input_length": 5, "output_length": 1, "colour": 1}',), "key = 'colour' is not known"),
        (('{"timestamp": 1, "input_length": 5, "output_length": 1}', '{"timestamp": 2, "input_length": 5}'), "line 2: output_length is missing"),
        (('{"input_toks": 3, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1]}',), r"input_tok_ids = .1. must be a list of 3"),
        (('{"arrival_time_ns": 0, "sub_requests": []}',), r"sub_requests = \[\] must be a list of 1"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "1,2," + "3" * 200_000), "line 2: is no row of a CSV file"),
        (("",), "holds no requests"),
    ],
)
def test_a_broken_file_is_named_with_row_and_rule(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        rows(write(tmp_path, "broken.txt", *lines))


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(TraceError, match="shipped: azure-conv-2023, mooncake-conversation"):
        open_requests("no-such-trace")


def test_shipped_excerpts_are_whole_and_attributed() -> None:
    assert {name: len(rows(name)) for name in library()} == {"azure-conv-2023": 1000, "mooncake-conversation": 250}
    notice = (next(iter(library().values())).parent / "NOTICE").read_text(encoding="utf-8")
    assert all(path.name in notice for path in library().values())


def test_poisson_arrivals_have_their_rate_and_seed() -> None:
    spec = "synthetic:poisson:5,prompt=10-20,output=3,n=20000"
    found = rows(spec)
    assert found[-1].arrival_s == pytest.approx(4000, rel=0.03)
    assert {one.prompt_tokens for one in found} == set(range(10, 21)) and {one.output_tokens for one in found} == {3}
    assert found[:50] == rows(spec)[:50] != rows(spec + ",seed=1")[:50]


def test_fixed_and_closed_specifications() -> None:
    assert [one.arrival_s for one in rows("synthetic:fixed:4,prompt=1,output=1,n=3")] == [0.0, 0.25, 0.5]
    closed = open_requests("synthetic:closed:3,prompt=1,output=1,n=4")
    assert closed.clients == 3 and len(list(closed)) == 4


@pytest.mark.parametrize(
    "spec",
    [
        "synthetic:poisson:0,prompt=1,output=1,n=1",
        "synthetic:poisson:1,prompt=1,output=1",
        "synthetic:gamma:1",
        "synthetic:closed:1.5,prompt=1,output=1,n=1",
        "synthetic:fixed:1,prompt=9-3,output=1,n=1",
    ],
)
def test_a_wrong_specification_is_refused(spec: str) -> None:
    with pytest.raises(TraceError, match="synthetic:"):
        open_requests(spec)


def test_a_long_trace_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("arrived_at,num_prefill_tokens,num_decode_tokens\n")
        file.writelines(f"{index * 0.01:.2f},100,10\n" for index in range(10_000))
    tracemalloc.start()
    assert sum(1 for _ in open_requests(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
