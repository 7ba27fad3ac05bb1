"""A smaller placement keeps what survives, holds every expert, and is refused only where there is no room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PlanError
from moesim.plan import linear
from moesim.runtime.moves import local_tables
from moesim.runtime.recovery import shrunk, to_fill
from tests.runtime.test_moves import plan_of


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 10**6), st.integers(0, 8), st.integers(0, 6), st.data())
def test_survivors_keep_their_experts_and_hold_the_lost_ones(experts: int, ranks: int, seed: int, extra: int, spare: int, data: st.DataObject) -> None:
    old = plan_of(experts, ranks, seed, extra)
    survivors = sorted(data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1)))
    before = local_tables(old)
    capacity = max(table.shape[1] for table in before) + spare
    room = len(survivors) * capacity
    if room < experts:
        with pytest.raises(PlanError, match=f"have room for {room} experts"):
            shrunk(old, survivors, capacity)
        return
    new = shrunk(old, survivors, capacity)  # Plan itself checks that every expert has a slot
    after = local_tables(new)
    assert np.bincount(new.slot_rank_S, minlength=len(survivors)).max() <= capacity
    for place, rank in enumerate(survivors):
        memory = np.full(after[place].shape, -1)
        memory[:, : before[rank].shape[1]] = before[rank]
        filled = to_fill(old, survivors, new, place)
        for row, slot, expert in filled:
            assert not any(expert in before[other][row] for other in survivors), "an expert that lives is not loaded again"
            memory[row, slot] = expert
        assert (memory[after[place] >= 0] == after[place][after[place] >= 0]).all(), "nothing else has to change"
    for row in range(3):
        living = {expert for rank in survivors for expert in before[rank][row].tolist()}
        assert living <= set(new.slot_to_expert_LS[row].tolist()) | {-1}


def test_an_expert_with_a_living_replica_is_not_loaded_and_shares_add_up() -> None:
    from dataclasses import replace

    table = np.array([[0, 1, 1, 2, 2, 3]])
    old = replace(linear(model="m", num_experts=4, moe_layer_ids=(0,), num_ranks=2), slot_to_expert_LS=table, slot_rank_S=np.repeat([0, 1, 2], 2), num_ranks=3)
    old = replace(old, share_LS=np.array([[1, 0.2, 0.8, 0.5, 0.5, 1]]))
    new = shrunk(old, [0, 2], 2)
    assert new.slot_to_expert_LS.tolist() == [[0, 1, 2, 3]] and new.shares_LS().tolist() == [[1, 1, 1, 1]]
    assert to_fill(old, [0, 2], new, 0) == to_fill(old, [0, 2], new, 1) == []
