"""How one plan may follow another while a deployment serves: what a slot gets, what may change, how balanced it is.

Shapes: L MoE layers, E experts, R ranks, S slots.
"""

from __future__ import annotations

import numpy as np

from moesim.balance import Balance, balance_of
from moesim.errors import SimulationError
from moesim.plan import Plan


def held_LER(plan: Plan) -> np.ndarray:
    """Return int64 [L, E, R]: slots of every rank that hold each expert."""
    layer, slot = np.nonzero(plan.slot_to_expert_LS >= 0)
    result = np.zeros((plan.num_layers, plan.num_experts, plan.num_ranks), dtype=np.int64)
    np.add.at(result, (layer, plan.slot_to_expert_LS[layer, slot], plan.slot_rank_S[slot]), 1)
    return result


def written_LR(old: Plan, new: Plan) -> np.ndarray:
    """Return int64 [L, R]: slots whose expert changes, copies within the rank included."""
    return np.asarray(np.maximum(held_LER(new) - held_LER(old), 0).sum(axis=1))


def plan_balance(plan: Plan, load_LE: np.ndarray, alive_R: np.ndarray) -> Balance:
    """Return the balance that `plan` gives these loads, over live ranks."""
    return balance_of(plan.rank_load_LR(load_LE)[:, alive_R])


def check_next(plan: Plan, new: Plan, alive_R: np.ndarray, *, same_slots: bool) -> None:
    """Raise SimulationError if `new` cannot follow `plan` in a run where only `alive_R` take part."""
    if (new.num_layers, new.num_experts, new.num_ranks) != (plan.num_layers, plan.num_experts, plan.num_ranks):
        shapes = [(p.num_layers, p.num_experts, p.num_ranks) for p in (plan, new)]
        raise SimulationError(f"planner: returned a plan of (layers, experts, ranks) = {shapes[1]}, must be {shapes[0]} like the running one")
    used_R = np.zeros(new.num_ranks, dtype=bool)
    used_R[new.slot_rank_S[(new.slot_to_expert_LS >= 0).any(axis=0)]] = True
    if (used_R & ~alive_R).any():
        raise SimulationError(f"planner: placed experts on rank {int((used_R & ~alive_R).argmax())}, which takes no part; plan for the live ranks only")
    if same_slots and not np.array_equal(plan.slot_rank_S, new.slot_rank_S):
        raise SimulationError("planner: changed the number of slots of a rank; a balancer keeps them, only a rank that joins or leaves changes them")
