"""What passes demand of every rank's experts: order, tokens, weights, replicas, choices that do not exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moesim.plan import Plan, linear
from moesim.sim.batch import Part, pass_shape
from moesim.sim.loads import LoadCompiler
from moesim.sim.offload_demand import Demands, demands_of, held_RLE
from moesim.sim.replay import compile_batch


def plan_of(ranks: int = 2) -> Plan:
    return linear(model="m", num_experts=4, moe_layer_ids=(0, 1), num_ranks=ranks)


def part_of(experts: list[list[list[int]]], **more: Any) -> Part:
    """Tokens [T][L][K], all on rank 0."""
    array = np.array(experts, dtype=np.uint8)
    zeros = np.zeros(len(array), dtype=np.int64)
    shape = pass_shape(rank_T=zeros, phase_T=zeros + 1, request_T=np.arange(len(array)), position_T=zeros, num_ranks=2)
    return replace(Part(shape, array, zeros, None), **more)


def demands(plan: Plan, *parts: Part) -> Demands:
    return demands_of([([part], compile_batch(LoadCompiler(plan, ranks_per_node=2), [part])) for part in parts], plan)


TWO = [[[3, 1], [0, 2]], [[1, 0], [2, 3]]]
"""Two tokens, two layers, two choices."""


def test_experts_come_in_the_order_of_their_first_mention_with_all_their_tokens() -> None:
    found = demands(plan_of(), part_of(TWO)).everywhere
    assert found.experts_TLW.tolist() == [[[3, 1, 0], [0, 2, 3]]]
    assert found.tokens_TLW.tolist() == [[[1, 2, 1], [1, 2, 1]]]
    assert found.widest == 3


def test_a_rank_is_asked_for_what_its_slots_serve() -> None:
    plan = plan_of()
    first, second = demands(plan, part_of(TWO)).of_rank
    assert first.experts_TLW.tolist() == [[[1, 0], [0, -1]]] and second.experts_TLW.tolist() == [[[3, -1], [2, 3]]]
    assert held_RLE(plan)[0].tolist() == [[True, True, False, False]] * 2


def test_replicas_on_one_rank_are_one_expert_and_on_two_ranks_share_its_tokens() -> None:
    plan = replace(plan_of(), slot_to_expert_LS=np.array([[0, 1, 1, 1, 2, 3]] * 2), slot_rank_S=np.repeat([0, 1], 3))
    tokens = part_of([[[1, 0], [1, 0]]] * 60)
    first, second = demands(plan, tokens).of_rank
    assert first.experts_TLW[0, 0].tolist() == [1, 0] and second.experts_TLW[0, 0].tolist() == [1]
    assert first.tokens_TLW[0, 0, 0] + second.tokens_TLW[0, 0, 0] == 60
    assert abs(first.tokens_TLW[0, 0, 0] - 40) <= 2, "two of three replicas"


def test_weights_add_up_and_choices_that_do_not_exist_are_left_out() -> None:
    weights = np.array([[[0.7, 0.3], [0.6, 0.4]], [[0.9, 0.1], [0.8, 0.2]]])
    valid = np.ones((2, 2, 2), dtype=bool)
    valid[1, 0, 1] = False
    found = demands(plan_of(), part_of(TWO, weights_TLK=weights, valid_TLK=valid)).everywhere
    assert found.experts_TLW[0, 0].tolist() == [3, 1, -1]
    assert found.weights_TLW[0, 0].tolist() == [0.7, 0.3 + 0.9, 0.0]


def test_passes_of_different_width_are_filled_up_and_predictions_kept_in_order() -> None:
    guess = np.array([[[2, 0], [1, 3]]], dtype=np.uint8)
    narrow, wide = part_of([[[3, 1], [0, 2]]], predicted_TLK=guess), part_of(TWO, predicted_TLK=np.concatenate([guess, guess[..., ::-1]]))
    found = demands(plan_of(), narrow, wide)
    assert found.everywhere.experts_TLW[0].tolist() == [[3, 1, -1], [0, 2, -1]]
    assert found.recorded_TLN is not None and found.recorded_TLN.tolist() == [[[2, 0], [1, 3]]] * 2
    assert demands(plan_of(), narrow, part_of(TWO)).recorded_TLN is None
