"""The planner: pruning loses nothing, answers move the right way with memory, bandwidth and service levels, errors say what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs import CostModel
from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.hardware.cluster import Cluster
from moesim.model import load_model
from moesim.solvers.parallelism import NoDeploymentError, ParallelismResult, Slo, Space, Workload, packed_placement, plan_parallelism
from moesim.solvers.parallelism.search import Search
from moesim.solvers.parallelism.step_time import StepTimer
from tests.solvers.parallelism_toys import ToyCosts, machine, tiny

SMALL = Space(pp=(1, 2, 3), micro_batches=(1, 2, 4), batch=(1, 2, 8, 16), prefill_batch=(1, 2), redundant=(0, 4))
WORK = Workload(prompt_tokens=40, output_tokens=12)


def toy(
    seed: int, cluster: Cluster, *, space: Space = SMALL, work: Workload = WORK, slo: Slo | None = None, prune: bool = True, **rest: Any
) -> ParallelismResult:
    return plan_parallelism(tiny(), cluster, work, slo, lambda _cluster, _model: ToyCosts(seed), space=space, prune=prune, **rest)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(4, 1), (2, 2), (6, 1)]),
    st.sampled_from([2e5, 1e6]),
    st.sampled_from([1e8, 1e12]),
    st.sampled_from(["throughput", "latency"]),
    st.sampled_from(["balanced", "zipf:1.0"]),
    st.sampled_from([None, 5]),
)
@settings(max_examples=12, deadline=None)
def test_pruned_search_equals_exhaustive_search(
    seed: int, nodes: tuple[int, int], memory: float, bandwidth: float, objective: str, routing: str, concurrency: int | None
) -> None:
    cluster = machine(*nodes, memory=memory, bandwidth=bandwidth)
    work = replace(WORK, routing=routing, concurrency=concurrency)
    pruned, full = (toy(seed, cluster, work=work, objective=objective, prune=prune) for prune in (True, False))
    assert pruned.front == full.front
    assert pruned.best.as_dict() == full.best.as_dict()
    assert full.counts.rates == full.counts.pipeline == 0
    for one in (pruned.counts, full.counts):
        assert one.points == one.memory + one.rates + one.pipeline + one.evaluated
    assert pruned.counts.evaluated <= full.counts.evaluated
    assert pruned.status == full.status == "OPTIMAL"


class FlatCosts(ToyCosts):
    """Every operator takes equally long, so that many points are equal."""

    def _wobble(self, name: str, *values: Any) -> np.ndarray:
        return np.full(np.broadcast_shapes(*(np.shape(value) for value in values)), self.scale)


def test_of_equal_points_the_first_in_order_is_kept() -> None:
    pruned, full = (
        plan_parallelism(tiny(), machine(4, 2), WORK, None, lambda _cluster, _model: FlatCosts(0), space=SMALL, prune=prune) for prune in (True, False)
    )
    assert pruned.front == full.front and pruned.best.as_dict() == full.best.as_dict()


def test_bounds_do_prune() -> None:
    result = toy(3, machine(4, bandwidth=1e7))
    assert result.counts.rates > 0 and result.counts.pipeline > 0 and result.counts.memory == 0


@given(st.integers(0, 10**6), st.sampled_from([1e8, 1e10, 1e12]))
@settings(max_examples=10, deadline=None)
def test_bounds_are_admissible(seed: int, bandwidth: float) -> None:
    cluster = machine(4, memory=1e6, bandwidth=bandwidth)
    search = Search(tiny(), cluster, WORK, SMALL, StepTimer(tiny(), cluster, WORK, ToyCosts(seed), packed_placement))
    search.run(lambda: 0.0)
    checked = 0
    for entry in search.entries:
        if entry.known.any():
            continue
        rates = entry.values.copy()
        search.bound(entry)
        even = entry.values.copy()
        for index in range(0, len(entry.points), 5):
            exact = search.settle(entry, index)
            assert (rates[index] <= even[index] + 1e-12 * np.abs(even[index])).all()
            assert (even[index] <= exact + 1e-12 * np.abs(exact)).all()
            checked += 1
    assert checked > 50


def test_every_point_of_the_front_is_nondominated() -> None:
    result = toy(5, machine(4, 2))
    rows = np.array([[one.tpot_ms, one.ttft_ms, -one.output_tokens_per_s_per_gpu] for one in result.front])
    for row in rows:
        assert not ((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any()
    assert len(rows) > 3


def test_more_service_level_never_lowers_throughput() -> None:
    reached = []
    for limit in (8.0, 10.0, 15.0, 25.0, 60.0, 1e4):
        try:
            result = toy(5, machine(4, 2), slo=Slo(tpot_ms=limit))
        except NoDeploymentError:
            reached.append(0.0)
            continue
        assert result.best.tpot_ms <= limit
        reached.append(result.best.output_tokens_per_s_per_gpu)
    assert reached == sorted(reached) and reached[0] < reached[-1]


def bare(factor: float) -> Cluster:
    """An H100 machine without tables, with memory and links `factor` times as fast."""
    cluster = load_cluster("h100-sxm-8")
    tiers = {name: replace(tier, read_Bps=tier.read_Bps * factor, write_Bps=tier.write_Bps * factor) for name, tier in cluster.tiers.items()}
    links = {name: replace(link, bandwidth_Bps=link.bandwidth_Bps * factor) for name, link in cluster.links.items()}
    return replace(cluster, name="bare", tables=None, tiers=tiers, links=links)


def test_faster_memory_and_links_never_lower_the_best_throughput() -> None:
    model, space = load_model("qwen3-30b-a3b"), Space(redundant=(0,), pp=(1, 2), micro_batches=(1, 2), batch=(1, 8, 64), prefill_batch=(1, 2))
    reached = [
        plan_parallelism(model, bare(factor), Workload(prompt_tokens=1000, output_tokens=200), None, CostModel, space=space).best.output_tokens_per_s_per_gpu
        for factor in (0.5, 1.0, 2.0, 4.0)
    ]
    assert reached == sorted(reached) and reached[0] < reached[-1]


def test_more_memory_never_lowers_the_best_throughput() -> None:
    reached = [toy(7, machine(4, memory=size)).best.output_tokens_per_s_per_gpu for size in (1.2e5, 2e5, 4e5, 1e6)]
    assert reached == sorted(reached)


def test_times_of_the_best_are_those_of_its_formula() -> None:
    result = toy(11, machine(4), space=replace(SMALL, modes=("mixed",), pp=(1,)))
    (pool,) = result.best.pools
    cycles = pool.batch / (pool.micro_batches * pool.prefill_batch)
    generation = cycles * pool.cycle_ms["prefill"] + 11 * pool.cycle_ms["decode"]
    assert result.best.tpot_ms == pytest.approx(pool.cycle_ms["decode"] + (cycles - 1) * pool.cycle_ms["prefill"] / 11)
    assert result.best.ttft_ms == pytest.approx(pool.cycle_ms["prefill"] + pool.cycle_ms["decode"])
    assert result.best.requests_per_s == pytest.approx(pool.instances * pool.batch * pool.parallel.dp / generation * 1e3)
    for phase, parts in pool.parts_ms.items():
        assert sum(parts.values()) == pytest.approx(pool.cycle_ms[phase])


@pytest.mark.parametrize("seed", range(6))
def test_parts_add_up_and_pools_use_all_devices(seed: int) -> None:
    result = toy(seed, machine(4, 2))
    for one in (result.best, result.runner_up):
        assert one is not None
        assert sum(one.gpu_s_per_request.values()) == pytest.approx(one.devices / one.requests_per_s, rel=1e-6)
        assert sum(pool.instances * pool.devices for pool in one.pools) == one.devices == 8
        for pool in one.pools:
            assert pool.parallel.tp * pool.parallel.dp == pool.parallel.ep * pool.parallel.expert_tp
            assert pool.parallel.tp * pool.parallel.dp * pool.parallel.pp == pool.devices
            assert len(pool.stage_layers) == pool.parallel.pp and pool.memory.missing_bytes == 0
    assert result.runner_up is not None
    assert result.runner_up.output_tokens_per_s_per_gpu <= result.best.output_tokens_per_s_per_gpu
    assert sum(result.lost_by.values()) == pytest.approx(sum(result.runner_up.gpu_s_per_request.values()) - sum(result.best.gpu_s_per_request.values()))
    assert result.reasons[0].startswith("runner-up ")


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_runner_up_is_the_best_of_other_degrees(objective: str) -> None:
    space = replace(SMALL, modes=("mixed",))
    result = toy(2, machine(4), space=space, objective=objective)
    assert result.runner_up is not None
    taken = result.best.parallel

    def value(one: Any) -> float:
        return one.tpot_ms if objective == "latency" else -one.output_tokens_per_s_per_gpu

    best = None
    for tp, ep, pp in {(tp, ep, pp) for tp in (1, 2, 4) for ep in (1, 2, 4) for pp in (1, 2, 3)}:
        for dp in (1, 2, 4):
            if tp * dp % ep or (tp, dp, ep, pp) == (taken.tp, taken.dp, taken.ep, taken.pp):
                continue
            try:
                part = toy(2, machine(4), space=replace(space, tp=(tp,), dp=(dp,), ep=(ep,), pp=(pp,)), objective=objective)
            except InputError:
                continue
            best = value(part.best) if best is None else min(best, value(part.best))
    assert best == pytest.approx(value(result.runner_up))


def test_arrivals_have_to_be_carried() -> None:
    free = toy(5, machine(4))
    with pytest.raises(NoDeploymentError, match="requests/s must be >= ") as caught:
        toy(5, machine(4), work=replace(WORK, arrival_rps=free.best.requests_per_s * 1.5))
    assert caught.value.requirement == "arrival"
    assert caught.value.would_do["arrival_rps"] == pytest.approx(free.best.requests_per_s)
    assert toy(5, machine(4), work=replace(WORK, arrival_rps=free.best.requests_per_s * 0.99)).best.label == free.best.label


def test_few_requests_in_flight_limit_the_rate() -> None:
    result = toy(5, machine(4), work=replace(WORK, concurrency=1))
    latency_s = (result.best.ttft_ms + 11 * result.best.tpot_ms) / 1e3
    assert result.best.requests_per_s <= 1 / latency_s * (1 + 1e-9)


def test_unreachable_service_levels_name_the_nearest_and_a_feasible_value() -> None:
    with pytest.raises(NoDeploymentError, match=r"TPOT [\d.]+ ms must be <= 0.001 ms; feasible: tpot_ms = ") as caught:
        toy(5, machine(4), slo=Slo(tpot_ms=0.001))
    assert caught.value.requirement == "slo" and caught.value.exit_code == 1
    again = toy(5, machine(4), slo=Slo(tpot_ms=caught.value.would_do["tpot_ms"]))
    assert again.best.tpot_ms == caught.value.would_do["tpot_ms"]
    with pytest.raises(NoDeploymentError):
        toy(5, machine(4), slo=Slo(tpot_ms=caught.value.would_do["tpot_ms"] * (1 - 1e-9)))


def test_too_little_memory_names_the_missing_bytes_and_a_remedy() -> None:
    with pytest.raises(NoDeploymentError, match=r"the nearest lacks .* \(\d+ bytes\): .*stage \d.* devices would do") as caught:
        toy(5, machine(4, memory=3e4))
    assert caught.value.requirement == "memory" and caught.value.missing_bytes
    enough = caught.value.would_do["device_memory_bytes"]
    assert enough == pytest.approx(3e4 + caught.value.missing_bytes / 0.9)
    assert toy(5, machine(4, memory=enough + 1)).status == "OPTIMAL"
    with pytest.raises(NoDeploymentError):
        toy(5, machine(4, memory=enough - 5))
    toy(5, machine(4, int(caught.value.would_do["devices"]) // 4, memory=3e4))


def test_no_consistent_shape_is_bad_input() -> None:
    with pytest.raises(InputError, match="must hold a deployment of all 4 devices"):
        toy(5, machine(4), space=replace(SMALL, tp=(3,)))
    with pytest.raises(InputError, match="objective = 'price'"):
        toy(5, machine(4), objective="price")


def test_a_deadline_caps_the_search_and_says_so() -> None:
    left = iter([1.0, 1.0] + [-1.0] * 10**6)
    result = toy(5, machine(4, 2), deadline=lambda: next(left))
    assert result.status == "TIME_LIMIT" and result.counts.unvisited > 0
    assert toy(5, machine(4, 2)).best.output_tokens_per_s_per_gpu >= result.best.output_tokens_per_s_per_gpu
    counts = result.counts
    assert counts.points == counts.memory + counts.rates + counts.pipeline + counts.evaluated + counts.unvisited


def test_result_is_plain_and_the_same_every_time() -> None:
    one, two = (json.dumps(toy(9, machine(4, 2)).as_dict(), sort_keys=True) for _ in range(2))
    assert one == two


def test_prefill_only_and_dense_models_are_planned() -> None:
    only = toy(4, machine(4), work=Workload(prompt_tokens=40, output_tokens=1))
    assert only.best.mode == "mixed" and only.best.tpot_ms == 0 and list(only.best.pools[0].cycle_ms) == ["prefill"]
    dense = plan_parallelism(tiny(layers=3, dense=3), machine(4), WORK, None, lambda _cluster, _model: ToyCosts(4), space=SMALL)
    assert all(pool.parallel.ep == pool.parallel.dp == 1 and pool.slots_per_rank == 0 for pool in dense.best.pools)


def test_deepseek_v3_on_32_h100_is_searched_completely() -> None:
    space = Space(redundant=(0,), pp=(1, 2, 4), batch=(1, 8, 32, 128), prefill_batch=(1, 4))
    result = plan_parallelism(
        load_model("deepseek-v3"), load_cluster("h100-sxm-8x4"), Workload(prompt_tokens=4096, output_tokens=1024), Slo(tpot_ms=60), CostModel, space=space
    )
    assert result.status == "OPTIMAL" and result.counts.memory > 0
    assert result.best.tpot_ms <= 60 and result.best.pools[-1].parallel.ep >= 8
    assert result.counts.clamped == 0, "tables of a real device are slower than its peak rates"
