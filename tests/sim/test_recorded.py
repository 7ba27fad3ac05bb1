"""Replays driven by recorded stage times: exact under the map they were recorded under, rescaled by the model elsewhere, refused if they do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.errors import CostError, InputError, MoesimError, TraceError
from moesim.plan import Plan, linear
from moesim.traces.in_memory import from_batches
from moesim.traces.manifest import STAGES
from moesim.traces.routing_trace import RoutingTrace, TokenBatch, TraceShape

MODEL: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "laptop-4"}
RANKS, STEPS, TOKENS = 4, 5, 24
ORDER = ("attention", "router", "dispatch", "experts", "shared", "combine")


def shape() -> TraceShape:
    from moesim.model import load_model

    model = load_model("flame-moe-290m")
    return TraceShape(model=model.name, num_experts=model.num_experts, top_k=model.top_k, moe_layer_ids=model.moe_layer_ids)


def routes(even: bool = False) -> TokenBatch:
    """STEPS steps of TOKENS tokens on each of RANKS ranks; even: every expert is chosen equally often in every step and layer."""
    kind, generator = shape(), np.random.Generator(np.random.PCG64(1))
    total = STEPS * RANKS * TOKENS
    experts = np.empty((total, kind.num_layers, kind.top_k), dtype=kind.dtype)
    for token in range(total):
        for layer in range(kind.num_layers):
            if even:
                experts[token, layer] = (token * kind.top_k + np.arange(kind.top_k) + layer) % kind.num_experts
            else:
                experts[token, layer] = np.minimum(generator.permutation(kind.num_experts)[: kind.top_k], kind.num_experts - 1)
                if token % 3:  # two thirds of the tokens stay among the first experts
                    experts[token, layer] = generator.permutation(kind.num_experts // 3)[: kind.top_k]
    step, rank = np.repeat(np.arange(STEPS), RANKS * TOKENS), np.tile(np.repeat(np.arange(RANKS), TOKENS), STEPS)
    return TokenBatch(
        step_T=(10 + 3 * step).astype(np.uint32), rank_T=rank.astype(np.uint16), request_T=np.arange(total, dtype=np.uint64) % (RANKS * TOKENS),
        position_T=np.arange(total, dtype=np.uint32), phase_T=np.ones(total, np.uint8), experts_TLK=experts,
    )  # fmt: skip


def kernels(seed: int = 0, barrier: bool = False) -> dict[str, np.ndarray]:
    """Random durations of every stage on every rank and step; barrier: exchanges last until all ranks have arrived, as real ones do."""
    from moesim.model import load_model

    model, generator, rows = load_model("flame-moe-290m"), np.random.Generator(np.random.PCG64(seed)), []
    for step in range(STEPS):
        clock = np.full(RANKS, 1_000_000_000 * (step + 1), dtype=np.int64)
        cells = [(0, "other")]
        for layer in range(model.num_layers):
            stages = [name for name in ORDER if name != "shared" or model.num_shared_experts]
            cells += [(layer, name) for name in (stages if layer in model.moe_layer_ids else ("attention", "dense"))]
        for layer, stage in [*cells, (model.num_layers, "other")]:
            length = generator.integers(1000, 90_000, RANKS)
            if barrier and stage in ("dispatch", "combine"):
                length += clock.max() - clock
            rows += [(10 + 3 * step, rank, layer, STAGES.index(stage), int(clock[rank]), int(length[rank]), 0, 0) for rank in range(RANKS)]
            clock = clock + length
    return {
        name: np.array(column)
        for name, column in zip(("step", "rank", "layer", "stage", "t_ns", "dur_ns", "bytes", "tokens"), zip(*rows, strict=True), strict=True)
    }


def trace(table: dict[str, np.ndarray] | None, *, even: bool = False, plan: Plan | None = None, **facts: Any) -> RoutingTrace:
    from moesim.files import canonical_json, sha256_hex

    parallel: dict[str, Any] = {"ep": RANKS}
    if plan is not None:
        content = plan.content()
        parallel["plans"] = {"0": {**content, "sha256": sha256_hex(canonical_json(content))}}
    made = from_batches(shape(), [routes(even)], source="test", facts={"parallel": parallel, **facts})
    return dataclasses.replace(made, tables=lambda name: table if name == "kernels" else None)


def serial_s(table: dict[str, np.ndarray]) -> np.ndarray:
    """[STEPS, RANKS]: all durations of a rank, one after the other."""
    result = np.zeros((STEPS, RANKS))
    np.add.at(result, ((table["step"] - 10) // 3, table["rank"]), table["dur_ns"] * 1e-9)
    return result


def with_tokens(table: dict[str, np.ndarray], change: int = 0) -> dict[str, np.ndarray]:
    """Add the tokens that linear blocks give every rank's experts, plus `change` in one row."""
    from moesim.sim.loads import LoadCompiler

    batch, kind, tokens = routes(), shape(), table["tokens"].copy()
    compiler = LoadCompiler(linear(model="m", num_experts=kind.num_experts, moe_layer_ids=kind.moe_layer_ids, num_ranks=RANKS), ranks_per_node=RANKS)
    for step in range(STEPS):
        rows = batch.step_T == 10 + 3 * step
        load_LR = compiler.compile(experts_TLK=batch.experts_TLK[rows], rank_T=batch.rank_T[rows].astype(np.int32)).rank_load_PLR[0]
        for row, layer in enumerate(kind.moe_layer_ids):
            for rank in range(RANKS):
                tokens[(table["step"] == 10 + 3 * step) & (table["layer"] == layer) & (table["stage"] == 3) & (table["rank"] == rank)] = load_LR[row, rank]
    tokens[np.flatnonzero(tokens)[0]] += change
    return {**table, "tokens": tokens}


@pytest.mark.parametrize("barrier", [False, True])
def test_a_replay_under_the_recorded_map_takes_exactly_the_recorded_time(barrier: bool) -> None:
    table = kernels(barrier=barrier)
    run = api.replay(trace(table), **MODEL, times="trace")
    serial = serial_s(table)
    assert run.ledger.duration_s == pytest.approx(serial.max(axis=1).tolist(), rel=1e-12)
    assert list(run.ledger.step) == [10, 13, 16, 19, 22]
    spent = np.zeros((STEPS, RANKS))
    for interval in run.ledger.intervals():
        spent[(interval.step - 10) // 3] += interval.end_R - interval.start_R
    assert spent == pytest.approx(serial, rel=1e-9)
    assert run.report["times"]["waits"] == ("separated" if barrier else "as recorded")
    assert run.report["routing"]["sharding"] == "recorded"


@pytest.mark.parametrize("barrier", [False, True])
def test_a_permuted_plan_on_equal_loads_changes_nothing(barrier: bool) -> None:
    """64 experts, 4 × 24 tokens × 6 choices: every expert, hence every rank of any permutation, gets 9."""
    made = trace(kernels(barrier=barrier), even=True)
    own, permuted = (api.replay(made, **MODEL, times="trace", placement=name) for name in ("linear", "random"))
    experts = [[interval.end_R - interval.start_R for interval in run.ledger.intervals() if interval.label == "experts"] for run in (own, permuted)]
    assert np.allclose(experts[0], experts[1], rtol=1e-9, atol=0)
    assert permuted.report["provenance"]["trace"] > 0.5


def test_only_what_the_plan_changes_is_rescaled_and_by_the_model() -> None:
    """The oracle is the formula: recorded · model(new plan) / model(recorded map), on the unrescaled replays of both plans."""
    table = kernels(barrier=True)
    made = trace(table)
    model = {name: api.replay(made, **MODEL, placement=name, times="trace") for name in ("linear", "random")}
    recorded = {(i.step, i.layer): i.end_R - i.start_R for i in model["linear"].ledger.intervals() if i.label == "experts"}
    driven = {(i.step, i.layer): i.end_R - i.start_R for i in model["random"].ledger.intervals() if i.label == "experts"}
    under = {name: expected_experts(made, name) for name in ("linear", "random")}
    changed = 0
    for key, value in recorded.items():
        new, old = under["random"][key], under["linear"][key]
        same = new[1] == old[1]
        changed += int((~same).sum())
        assert driven[key] == pytest.approx(np.where(same, value, value * new[0] / old[0]), rel=1e-9)
    assert changed > 0
    for label in ("attention", "gate"):
        left, right = ([i.end_R - i.start_R for i in model[name].ledger.intervals() if i.label == label] for name in ("linear", "random"))
        assert np.allclose(left, right, rtol=1e-9, atol=0), label
    assert model["random"].report["times"]["work_share"]["rescaled"] > 0


def expected_experts(made: RoutingTrace, placement: str) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """(step, layer) → (model seconds, tokens) of the experts of every rank, straight from the cost model."""
    from moesim.costs.model import CostModel
    from moesim.hardware import load_cluster
    from moesim.model import load_model

    model, kind, batch = load_model("flame-moe-290m"), shape(), routes()
    plan = linear(model=model.name, num_experts=kind.num_experts, moe_layer_ids=kind.moe_layer_ids, num_ranks=RANKS, kind=placement)
    costs, result = CostModel(load_cluster("laptop-4"), model), {}
    for step in range(STEPS):
        chosen = batch.experts_TLK[batch.step_T == 10 + 3 * step]
        for row, layer in enumerate(kind.moe_layer_ids):
            count = np.bincount(chosen[:, row].ravel(), minlength=kind.num_experts)
            slots_RC = count[plan.slot_to_expert_LS[row]].reshape(RANKS, -1)
            result[10 + 3 * step, layer] = costs.experts(slots_RC).seconds, slots_RC.sum(axis=1)
    return result


def test_waiting_is_told_apart_only_where_time_stamps_allow_it() -> None:
    table = kernels(barrier=True)
    assert api.replay(trace(table), **MODEL, times="trace").report["breakdown_ms"]["straggler_wait"] > 0
    blind = {**table, "t_ns": np.zeros_like(table["t_ns"])}
    assert "straggler_wait" not in api.replay(trace(blind), **MODEL, times="trace").report["breakdown_ms"]


def test_stages_without_times_fall_back_and_strict_says_so() -> None:
    table = kernels()
    part = {name: values[table["stage"] == STAGES.index("experts")] for name, values in table.items()}
    report = api.replay(trace(part), **MODEL, times="trace").report
    assert report["times"]["stages"] == ["experts"]
    assert 0 < report["provenance"]["trace"] < 1 and report["times"]["work_share"]["modelled"] > 0
    assert report["provenance"]["trace"] == pytest.approx(report["times"]["work_share"]["recorded"], rel=0.02)
    with pytest.raises(CostError, match="strict"):
        api.replay(trace(part), **MODEL, times="trace", strict=True)
    whole = api.replay(trace(table), **MODEL, times="trace", strict=True).report
    assert whole["provenance"] == {name: float(name == "trace") for name in whole["provenance"]}
    with pytest.raises(CostError, match="plan changes its load"):
        api.replay(trace(table), **MODEL, times="trace", strict=True, placement="random")


def test_the_recorded_map_is_read_from_the_trace_and_checked_against_recorded_tokens() -> None:
    kind = shape()
    plan = linear(model=kind.model, num_experts=kind.num_experts, moe_layer_ids=kind.moe_layer_ids, num_ranks=RANKS, kind="random", seed=3)
    table = kernels()
    own = api.replay(trace(table, plan=plan), **MODEL, times="trace", plan=plan)
    assert own.ledger.duration_s == pytest.approx(serial_s(table).max(axis=1).tolist(), rel=1e-12)
    assert own.report["times"]["map"] == "recorded"
    assert api.replay(trace(table, plan=plan), **MODEL, times="trace").report["times"]["work_share"]["rescaled"] > 0
    api.replay(trace(with_tokens(table)), **MODEL, times="trace")
    with pytest.raises(TraceError, match="placement"):
        api.replay(trace(with_tokens(table), plan=plan), **MODEL, times="trace", plan=plan)
    with pytest.raises(TraceError, match="computed"):
        api.replay(trace(with_tokens(table, change=1)), **MODEL, times="trace")


def test_every_step_is_rescaled_from_the_map_that_was_in_force() -> None:
    kind, table = shape(), kernels()
    plans = [
        linear(model=kind.model, num_experts=kind.num_experts, moe_layer_ids=kind.moe_layer_ids, num_ranks=RANKS, kind=name) for name in ("linear", "random")
    ]
    steps = {"step": np.repeat(10 + 3 * np.arange(STEPS), RANKS), "map_epoch": np.repeat([0, 0, 0, 1, 1], RANKS)}
    base = trace(table, plan=plans[0])
    node = {**base.facts["parallel"], "plans": {"0": base.facts["parallel"]["plans"]["0"], "1": trace(table, plan=plans[1]).facts["parallel"]["plans"]["0"]}}
    made = dataclasses.replace(base, facts={**base.facts, "parallel": node}, tables={"kernels": table, "steps": steps}.get)
    serial = serial_s(table).max(axis=1)
    for plan, own in zip(plans, (slice(0, 3), slice(3, 5)), strict=True):
        run = api.replay(made, **MODEL, times="trace", plan=plan)
        exact = np.isclose(np.array(run.ledger.duration_s), serial, rtol=1e-12)
        assert exact[own].all() and exact.sum() == len(serial[own])
    lost = dataclasses.replace(made, facts={**base.facts, "parallel": {**node, "plans": {"0": node["plans"]["0"]}}})
    with pytest.raises(TraceError, match="epoch 1"):
        api.replay(lost, **MODEL, times="trace")


def test_one_rank_takes_all_that_was_recorded() -> None:
    """It exchanges nothing, yet sorts and sums around its experts."""
    table = kernels()
    mine = {name: column[table["rank"] == 0] for name, column in table.items()}
    batch = routes()
    made = from_batches(shape(), [dataclasses.replace(batch, rank_T=np.zeros_like(batch.rank_T))], source="test")
    made = dataclasses.replace(made, tables=lambda name: mine if name == "kernels" else None)
    run = api.replay(made, model="flame-moe-290m", hardware="laptop-1", times="trace")
    assert list(run.ledger.duration_s) == pytest.approx(serial_s(mine)[:, 0].tolist(), rel=1e-12)


def first_row(name: str, value: int) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda table: {**table, name: np.r_[value, table[name][1:]]}


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda table: None, {}, "no table of kernel times"),
        (lambda table: {name: column[:0] for name, column in table.items()}, {}, "no row"),
        (lambda table: {name: column[1:] for name, column in table.items()}, {}, "no time of step 10, rank 0"),
        (lambda table: {name: column[table["step"] != 16] for name, column in table.items()}, {}, "no times of step 16"),
        (first_row("rank", 4), {}, "ranks"),
        (first_row("stage", 8), {}, "stage"),
        (first_row("dur_ns", -1), {}, "dur_ns"),
        (first_row("t_ns", -(1 << 63)), {}, "t_ns"),
        (first_row("layer", 999), {}, "layer"),
        (lambda table: table, {"hardware": "h100-sxm-8"}, "must equal the 8 devices"),
        (lambda table: table, {"tokens_per_step": 64}, "tokens-per-step"),
        (lambda table: table, {"settings": {"micro_batches": "2"}}, "micro_batches"),
        (lambda table: table, {"times": "clock"}, "must be model or trace"),
        (lambda table: {**table, "layer": np.where((table["layer"] == 3) & (table["stage"] == 3), 0, table["layer"])}, {}, "layer"),
    ],
)
def test_times_that_do_not_fit_are_refused(change: Callable[..., Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(MoesimError, match=says) as caught:
        api.replay(trace(change(kernels())), **{**MODEL, "times": "trace", **options})
    assert isinstance(caught.value, InputError)
