"""What a pass carries on every rank: counts against a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.sim.batch import DECODE, PREFILL, micro_batch_T, pass_shape, stack
from moesim.sim.settings import Settings


@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 4))
def test_counts_match_a_loop_over_tokens(seed: int, tokens: int, ranks: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    rank = np.sort(rng.integers(0, ranks, tokens))
    request = rng.integers(0, 5, tokens).astype(np.uint64)
    phase = np.where(request % 2 == 0, PREFILL, DECODE)
    position = rng.integers(0, 100, tokens)
    shape = pass_shape(rank_T=rank, phase_T=phase, request_T=request, position_T=position, num_ranks=ranks)
    for r in range(ranks):
        entries = 0
        for name, code in (("prefill", PREFILL), ("decode", DECODE)):
            last: dict[int, int] = {}
            for t in range(tokens):
                if rank[t] == r and phase[t] == code:
                    last[int(request[t])] = max(last.get(int(request[t]), 0), int(position[t]) + 1)
            assert getattr(shape, f"{name}_tokens_PR")[0, r] == ((rank == r) & (phase == code)).sum()
            assert getattr(shape, f"{name}_seqs_PR")[0, r] == len(last)
            assert getattr(shape, f"{name}_context_PR")[0, r] == pytest.approx(sum(last.values()) / max(len(last), 1))
            entries += sum(last.values())
        assert shape.kv_entries_PR[0, r] == pytest.approx(entries), "drafts of a request share its cache"
    assert shape.tokens_PR.sum() == tokens


def test_grouping_sums_over_consecutive_ranks_and_averages_context() -> None:
    shape = pass_shape(
        rank_T=np.array([0, 1, 1, 2]), phase_T=np.zeros(4, dtype=int), request_T=np.array([1, 2, 2, 3]), position_T=np.array([9, 0, 29, 4]), num_ranks=4
    )
    pair = shape.grouped(2)
    assert pair.prefill_tokens_PR.tolist() == [[3, 3, 1, 1]]
    assert pair.prefill_context_PR.tolist() == [[20, 20, 5, 5]]
    assert shape.grouped(1) is shape


def test_stacking_keeps_the_order_of_passes() -> None:
    one, two = (pass_shape(rank_T=np.zeros(n, dtype=int), phase_T=np.zeros(n), request_T=np.zeros(n), position_T=np.arange(n), num_ranks=1) for n in (1, 2))
    assert stack([one, two]).prefill_tokens_PR.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("items", "rule"),
    [
        ({"dispach": "normal"}, "did you mean 'dispatch'"),
        ({"dispatch": "fast"}, "must be one of auto"),
        ({"attention_tp": "two"}, "must be of type int"),
        ({"attention_tp": "0"}, "must be >= 1"),
        ({"host_overhead_us": "nan"}, "must be in"),
        ({"shared_experts": "never"}, "must be one of serial"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_remedy(items: dict[str, str], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        Settings.parse(items)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_micro_batches_split_every_rank_evenly_and_in_order(counts: list[int], parts: int) -> None:
    rank_T = np.repeat(np.arange(len(counts)), counts)
    part_T = micro_batch_T(rank_T, parts)
    for rank, count in enumerate(counts):
        mine = part_T[rank_T == rank]
        sizes = np.bincount(mine, minlength=parts)
        assert (np.diff(mine) >= 0).all() and sizes.sum() == count and sizes.max() - sizes.min() <= 1
