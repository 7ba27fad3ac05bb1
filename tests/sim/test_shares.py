"""Max-min shares against textbook networks and the properties that define them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.sim.shares import by_class, guaranteed, max_min


def crossing(*paths: tuple[int, ...], ports: int) -> np.ndarray:
    result = np.zeros((len(paths), ports), dtype=bool)
    for row, path in enumerate(paths):
        result[row, list(path)] = True
    return result


def test_three_flow_line_network() -> None:
    """Flow 0 crosses both links of a line, flows 1 and 2 one each: links of 1 and 2 give 1/2, 1/2 and 3/2."""
    assert max_min(crossing((0, 1), (0,), (1,), ports=2), np.array([1.0, 2.0])).tolist() == pytest.approx([0.5, 0.5, 1.5])


@pytest.mark.parametrize("links", [1, 2, 5, 9])
def test_parking_lot(links: int) -> None:
    """One long flow over n equal links, one short flow on each: everyone gets half."""
    rates = max_min(crossing(tuple(range(links)), *((i,) for i in range(links)), ports=links), np.ones(links))
    assert rates.tolist() == pytest.approx([0.5] * (links + 1))


def test_parking_lot_where_flows_enter_one_by_one() -> None:
    """Flow i enters at link i and leaves after the last: the last link is shared by all, the others have room."""
    assert max_min(crossing((0, 1, 2), (1, 2), (2,), ports=3), np.array([1.0, 1.0, 0.9])).tolist() == pytest.approx([0.3] * 3)
    assert max_min(crossing((0, 1, 2), (1, 2), (2,), ports=3), np.array([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.4, 0.4])


def test_bertsekas_gallager_example() -> None:
    """Five flows on a path of four links with capacities 1, 1, 1, 1: two bottlenecks, 1/3 and 2/3."""
    rates = max_min(crossing((0,), (0, 1), (1, 2), (1,), (2, 3), ports=4), np.ones(4))
    assert rates.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_weights_divide_a_port_in_proportion() -> None:
    assert max_min(np.ones((3, 1), bool), np.array([12.0]), np.array([1.0, 2.0, 3.0])).tolist() == pytest.approx([2, 4, 6])


def test_a_limited_flow_leaves_the_rest() -> None:
    rates = max_min(np.ones((3, 1), bool), np.array([9.0]), limit_F=np.array([1.0, np.inf, np.inf]))
    assert rates.tolist() == pytest.approx([1, 4, 4])


def test_strict_classes_take_what_is_left() -> None:
    crosses = crossing((0, 1), (0,), (1,), ports=2)
    assert by_class(crosses, np.array([1.0, 3.0]), np.array([0, 1, 1])).tolist() == pytest.approx([1, 0, 2])


def test_the_guarantee_counts_on_narrow_flows_staying_narrow() -> None:
    assert guaranteed(10.0, np.ones(1), np.ones(1), np.array([10.0])) == 5.0
    assert guaranteed(10.0, np.ones(1), np.ones(1), np.array([1.0])) == 9.0
    assert guaranteed(10.0, np.ones(3), np.ones(3), np.array([1.0, 20.0, 20.0])) == 3.0


def test_an_inefficient_flow_takes_more_of_the_port_than_it_moves() -> None:
    """Equal rates of which one counts twice: 3 + 2 · 3 = 9."""
    assert max_min(np.array([[1.0], [2.0]]), np.array([9.0])).tolist() == pytest.approx([3, 3])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 3), st.floats(0.1, 5), st.floats(0.01, 50)), max_size=6), st.floats(1, 20))
def test_the_guarantee_is_max_min_with_limits_on_one_port(claims: list[tuple[float, float, float]], capacity: float) -> None:
    use, weight, limit = (np.array([claim[i] for claim in claims]) for i in range(3))
    rates = max_min(np.r_[1.0, use][:, None], np.array([capacity]), np.r_[1.0, weight], limit_F=np.r_[np.inf, limit])
    assert guaranteed(capacity, use, weight, limit) == pytest.approx(rates[0], rel=1e-9)


def test_a_flow_without_a_bound_is_refused() -> None:
    with pytest.raises(SimulationError, match="no bound"):
        max_min(np.zeros((1, 2), bool), np.ones(2))


@pytest.mark.parametrize(("capacity", "weight"), [([-1.0], [1.0]), ([1.0], [0.0]), ([np.nan], [1.0]), ([1.0, 1.0], [1.0])])
def test_impossible_networks_are_refused(capacity: list[float], weight: list[float]) -> None:
    with pytest.raises(SimulationError, match="max-min"):
        max_min(np.ones((1, 1), bool), np.array(capacity), np.array(weight))


@st.composite
def networks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ports = draw(st.integers(1, 6))
    rows = draw(st.lists(st.sets(st.integers(0, ports - 1), min_size=1), min_size=1, max_size=8))
    capacity = draw(st.lists(st.floats(0.1, 100), min_size=ports, max_size=ports))
    weight = draw(st.lists(st.floats(0.1, 10), min_size=len(rows), max_size=len(rows)))
    return crossing(*(tuple(row) for row in rows), ports=ports), np.array(capacity), np.array(weight)


@settings(max_examples=300, deadline=None)
@given(networks())
def test_rates_are_feasible_and_every_flow_has_a_bottleneck(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Bottleneck condition (equivalent to max-min, hence Pareto): a full port on which no other flow has a greater rate per weight."""
    crosses, capacity, weight = case
    rates = max_min(crosses, capacity, weight)
    used = rates @ crosses
    assert (rates > 0).all() and (used <= capacity * (1 + 1e-9)).all()
    level = rates / weight
    for flow in range(len(rates)):
        full = crosses[flow] & (used >= capacity * (1 - 1e-9))
        assert any(level[crosses[:, port]].max() <= level[flow] * (1 + 1e-9) for port in np.flatnonzero(full))


@settings(max_examples=150, deadline=None)
@given(networks(), st.integers(0, 2**31))
def test_no_flow_gains_without_a_poorer_one_losing(case: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int) -> None:
    """Random feasible rates never beat max-min in the sorted (leximin) order of rate per weight."""
    crosses, capacity, weight = case
    best = np.sort(max_min(crosses, capacity, weight) / weight)
    other = np.random.Generator(np.random.PCG64(seed)).uniform(0, 1, len(weight)) * weight
    other *= (capacity / np.maximum(other @ crosses, 1e-300)).min()
    for mine, theirs in zip(best, np.sort(other / weight), strict=True):
        if abs(mine - theirs) > 1e-9 * max(mine, 1.0):
            assert mine > theirs
            break


@settings(max_examples=100, deadline=None)
@given(networks())
def test_order_and_scale_do_not_matter(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    crosses, capacity, weight = case
    rates = max_min(crosses, capacity, weight)
    assert max_min(crosses[::-1], capacity, weight[::-1])[::-1] == pytest.approx(rates, rel=1e-9)
    assert max_min(crosses, capacity * 3, weight * 7) == pytest.approx(rates * 3, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(networks())
def test_a_claim_never_gets_less_than_its_guarantee(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    crosses, capacity, weight = case
    narrowest = np.where(crosses, capacity, np.inf).min(axis=1)
    for port in range(len(capacity)):
        claim = np.zeros((1, len(capacity)), dtype=bool)
        claim[0, port] = True
        true = max_min(np.r_[crosses, claim], capacity, np.r_[weight, 1.0])[-1]
        here = crosses[:, port]
        assert guaranteed(capacity[port], np.ones(here.sum()), weight[here], narrowest[here]) <= true * (1 + 1e-9)
