"""Plans of many steps against single steps, with step times of real tables: they bend with the contexts, and replicas overtake one another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.group import Group
from moesim.costs.group_loads import capped_LE, linear_placement
from moesim.costs.model import CostModel
from moesim.costs.step import StepModel
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.sim.serving.curves import StepCurves
from moesim.sim.serving.instance import Instance, Pool
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.serving.simulate import ServingRun
from moesim.traces.requests.document import Request
from tests.sim.serving.toys import Times, run

MODELS = {"llama-3.1-8b": Group(1, 2, 1, 1, 0), "qwen3-30b-a3b": Group(1, 4, 4, 1, 32)}


@pytest.fixture(scope="module", params=MODELS)
def curves(request: pytest.FixtureRequest) -> StepCurves:
    cluster, model = load_cluster("h100-sxm-8"), load_model(request.param)
    assign = capped_LE(np.ones((1, model.num_experts)), model.top_k) if model.num_experts else np.zeros((0, 0))
    steps = StepModel(model, cluster, CostModel(cluster, model, backend="vllm"), assign, linear_placement)
    return StepCurves(steps, MODELS[request.param], pp=1, max_tokens=64, max_seqs=8, max_context=512, verify=3)


@given(
    seed=st.integers(0, 10**6),
    gain=st.sampled_from([1.0, 1.7, 3.0]),
    clients=st.sampled_from([0, 3, 20]),
    spare=st.sampled_from([4, 1000]),
    split=st.booleans(),
    separate=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_plan_ends_when_its_steps_end(curves: StepCurves, seed: int, gain: float, clients: int, spare: int, split: bool, separate: bool) -> None:
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(0.05, 20))
    # Beyond the last tabulated context times go on as before it.
    rows = [Request(str(n), float(at[n]), int(rng.integers(1, 120)), int(rng.integers(1, 600))) for n in range(20)]
    chosen = ServingSettings(
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=16,
        acceptance=gain,
        draft_tokens=2,
        clients=clients,
        client_us=700.0,
        sequence_us=20.0,
        batches="separate" if separate else "mixed",
        prefill_instances=int(split),
    )
    pool = Pool(curves=curves, instances=2, blocks=46 + spare, host_s=1e-4, draft_s=2e-4, scale=1.25)
    more = {"prefill": Pool(curves=curves, instances=1, blocks=200), "transfer_s": lambda tokens: 1e-5 * tokens} if split else {}

    def once() -> tuple[ServingRun, Times]:
        return run(rows, chosen, pool, **more)

    planned, times = once()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Instance, "leap", lambda self, flight: None)
        single, expected = once()
    assert times == {name: pytest.approx(both, rel=1e-10) for name, both in expected.items()}
    assert (planned.step.count, planned.preemptions, planned.kv_peak) == (single.step.count, single.preemptions, single.kv_peak)
    assert planned.step.percentile(0, 25, 50, 75, 100) == pytest.approx(single.step.percentile(0, 25, 50, 75, 100), rel=1e-9)
    for name in planned.sums.__dataclass_fields__:
        assert getattr(planned.sums, name) == pytest.approx(getattr(single.sums, name), rel=1e-9), name
