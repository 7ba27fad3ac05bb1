"""Trace statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.statistics import coactivation, drift, inter_layer_affinity, load_curves, slot_value


def routes(experts_TLK: np.ndarray, experts: int) -> TokenRoutes:
    """Return tokens with given choices."""
    count = len(experts_TLK)
    return TokenRoutes(
        experts_TLK=experts_TLK.astype(np.uint8), request_T=np.arange(count, dtype=np.uint64), home_T=np.zeros(count, dtype=np.int64), num_experts=experts
    )


def plan(load_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plan 4 experts on 2 ranks."""
    return solve(PlacementProblem(load_KLE=load_LE, num_ranks=2, slots_per_rank_R=np.array(2))).slot_to_expert_LS, np.array([0, 0, 1, 1])


def test_curves_of_known_loads() -> None:
    curves = load_curves(np.array([[5.0, 5, 5, 5], [0, 0, 8, 0], [0, 0, 0, 0], [1, 2, 3, 4]]), top_shares=(0.25, 0.5, 1.0))
    np.testing.assert_allclose(curves.gini_L, [0, 0.75, 0, 0.25])
    np.testing.assert_allclose(curves.cv_L, np.array([0, np.sqrt(3), 0, np.sqrt(1.25) / 2.5]))
    np.testing.assert_allclose(curves.max_over_mean_L, [1, 4, 1, 1.6])
    np.testing.assert_allclose(curves.top_load_LX, np.array([[0.25, 0.5, 1], [1, 1, 1], [0, 0, 0], [0.4, 0.7, 1]]))
    np.testing.assert_allclose(curves.share_LE[3], [0.4, 0.3, 0.2, 0.1])
    assert curves.rows()[3]["top_0.5"] == pytest.approx(0.7) and len(curves.rows()) == 4


def test_drift_of_known_windows() -> None:
    load = np.array([[[4.0, 4, 0, 0]], [[0, 0, 2, 2]], [[8, 8, 0, 0]], [[3, 1, 3, 1]]])
    found = drift(load, planner=plan, names=("a", "b", "c", "d"))
    np.testing.assert_allclose(found.l1_KK, [[0.0, 1, 0, 0.5], [1.0, 0, 1, 0.5], [0.0, 1, 0, 0.5], [0.5, 0.5, 0.5, 0]], atol=1e-12)
    np.testing.assert_allclose(found.cosine_KK[0], np.array([1, 0, 1, 4 / np.sqrt(40)]), atol=1e-12)
    assert found.transfer_KK is not None
    np.testing.assert_allclose(np.diag(found.transfer_KK), 1.0)
    assert found.transfer_KK[0, 2] == pytest.approx(1.0)
    assert found.transfer_loss >= 0 and len(found.rows()) == 16 and found.rows()[1]["planned_on"] == "a"
    assert drift(load).transfer_KK is None and drift(load).transfer_loss == 0.0


def test_information_of_a_deterministic_chain_is_the_entropy() -> None:
    first = np.arange(4000) % 8
    found = inter_layer_affinity(routes(np.stack((first, (first + 3) % 8), axis=1)[:, :, None], 8))
    assert found.information_n[0] == pytest.approx(3.0) and found.top_share_n[0] == pytest.approx(1.0)
    assert found.null_information_n[0] < 0.02 and found.null_top_share_n[0] < 0.2
    assert found.rows()[0]["information_bits"] == pytest.approx(3.0)


def test_independent_layers_carry_no_more_information_than_their_null() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    found = inter_layer_affinity(routes(generator.integers(0, 8, (5000, 3, 1)), 8))
    assert (np.abs(found.information_n - found.null_information_n) < 0.01).all()


def test_coactivation_of_fixed_partners_and_its_null() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    first = generator.integers(0, 4, 4000) * 2
    found = coactivation(routes(np.stack((first, first + 1), axis=1)[:, None, :], 8))
    assert found.top_share_n[0] == pytest.approx(1.0) and found.null_top_share_n[0] < 0.25
    np.testing.assert_allclose(found.joint_nEE, found.joint_nEE.transpose(0, 2, 1))
    assert found.joint_nEE.sum() == pytest.approx(1.0)


def test_value_of_slots_on_one_hot_expert() -> None:
    # one expert takes all: r + 1 ranks can share it, so the balance is at most (r + 1) / G
    found = slot_value(np.array([[1.0, 0, 0, 0]]), num_ranks=4, extra_slots=(0, 1, 2, 3))
    np.testing.assert_allclose(found.total_N, [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.gain_per_slot_N, [0, 0.25, 0.25, 0.25], rtol=1e-5)
    assert found.rows()[1]["extra_slots"] == 1


def test_value_of_slots_is_above_what_a_planner_reaches() -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    load = np.round(1e4 * generator.lognormal(0, 1, (3, 16)))
    found = slot_value(load, num_ranks=4)
    assert found.extra_N.tolist() == [0, 4, 8, 16] and (found.bound_NL <= 1).all()
    for extra, bound in zip(found.extra_N.tolist(), found.total_N.tolist(), strict=True):
        reached = solve(PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(4 + extra // 4))).value
        assert reached <= bound * (1 + 1e-9)


def test_bad_input_is_refused_by_name() -> None:
    for call, key in (
        (lambda: load_curves(np.ones(3)), "load shape"),
        (lambda: load_curves(-np.ones((2, 2))), "load"),
        (lambda: load_curves(np.ones((2, 2)), top_shares=(0.0,)), "top_shares"),
        (lambda: drift(np.ones((2, 1, 4)), names=("a",)), "names"),
        (lambda: slot_value(np.ones((1, 4)), num_ranks=2, extra_slots=(2, 1)), "extra_slots"),
        (lambda: slot_value(np.ones((1, 4)), num_ranks=0), "num_ranks"),
    ):
        with pytest.raises(InputError, match=key):
            call()
