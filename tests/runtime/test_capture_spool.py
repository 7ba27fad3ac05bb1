"""A spool becomes a trace of whole steps, even while its ranks go on writing; requests and prompts are reproducible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from moesim.errors import InputError  # noqa: E402
from moesim.plan import Parallel, linear  # noqa: E402
from moesim.runtime.capture_spool import Spool, check_target, publish, spooled_steps  # noqa: E402
from moesim.runtime.serving import Workload, request_id  # noqa: E402
from moesim.traces.open import open_trace  # noqa: E402
from moesim.traces.routing_trace import TraceShape  # noqa: E402


def spooled(folder: Path, shape: TraceShape, steps_of_rank: list[int]) -> dict[tuple[int, int], np.ndarray]:
    """Write random routes; return (step, rank) → [tokens, layers, top-k]."""
    generator = np.random.Generator(np.random.PCG64(0))
    routes = {}
    for rank, steps in enumerate(steps_of_rank):
        spool = Spool(folder, rank, shape)
        for step in range(steps):
            tokens = int(generator.integers(1, 9))
            ids = generator.permuted(np.tile(np.arange(shape.num_experts), (tokens, shape.num_layers, 1)), axis=2)[..., : shape.top_k]
            routes[step, rank] = ids
            spool.add(
                step=step, epoch=step // 3, phase=step % 2, requests=np.arange(tokens) + 10, positions=np.arange(tokens),
                experts_LNk=[torch.from_numpy(ids[:, layer]) for layer in range(shape.num_layers)], start_ns=step, end_ns=step + 1,
            )  # fmt: skip
        spool.close()
    return routes


@pytest.mark.parametrize("experts", [8, 300])
def test_a_trace_holds_exactly_the_steps_that_all_ranks_have_written(tmp_path: Path, experts: int) -> None:
    shape = TraceShape(model="m", num_experts=experts, top_k=3, moe_layer_ids=(1, 2))
    routes = spooled(tmp_path / "spool", shape, [5, 4, 6])
    with (tmp_path / "spool" / "tokens-1").open("ab") as half:
        half.write(b"half a row")
    assert spooled_steps(tmp_path / "spool", 3) == 4
    rows = publish(tmp_path / "spool", 3, shape, tmp_path / "trace", {"tool": "test"})
    trace = open_trace(str(tmp_path / "trace"))
    assert trace.num_rows == rows == sum(len(ids) for (step, _), ids in routes.items() if step < 4)
    batches = list(trace.batches())
    steps, ranks = np.concatenate([batch.step_T for batch in batches]), np.concatenate([batch.rank_T for batch in batches])
    experts_TLK = np.concatenate([batch.experts_TLK for batch in batches])
    assert (np.diff(steps.astype(np.int64)) >= 0).all()
    for (step, rank), ids in routes.items():
        assert (experts_TLK[(steps == step) & (ranks == rank)] == (ids if step < 4 else ids[:0])).all()


@pytest.mark.parametrize(("degrees", "wanted"), [({"tp": 2, "ep": 4, "dp": 2}, (2, 4, 2, 1)), ({"tp": 4, "pp": 2}, (4, 4, 1, 2)), ({}, (1, 4, 4, 1))])
def test_a_trace_names_the_true_degrees_of_its_mesh(tmp_path: Path, degrees: dict[str, int], wanted: tuple[int, ...]) -> None:
    shape = TraceShape(model="m", num_experts=8, top_k=1, moe_layer_ids=(0,))
    plan = replace(linear(model="m", num_experts=8, moe_layer_ids=(0,), num_ranks=4), parallel=Parallel(**degrees))
    for rank in range(4):
        spool = Spool(tmp_path / "spool", rank, shape, ranks=4)
        ids = [torch.zeros((2, 1), dtype=torch.int64)]
        spool.add(step=0, epoch=0, phase=0, requests=np.arange(2), positions=np.arange(2), experts_LNk=ids, start_ns=0, end_ns=1, plan=plan)
        spool.close()
    publish(tmp_path / "spool", 4, shape, tmp_path / "trace", {})
    parallel = open_trace(str(tmp_path / "trace")).facts["parallel"]
    assert tuple(parallel[name] for name in ("tp", "ep", "dp", "pp")) == wanted and list(parallel["plans"]) == ["0"]


def test_publishing_again_replaces_the_trace_but_never_a_folder_of_other_things(tmp_path: Path) -> None:
    shape = TraceShape(model="m", num_experts=8, top_k=2, moe_layer_ids=(0,))
    spooled(tmp_path / "spool", shape, [3])
    (tmp_path / "trace").mkdir()
    for _ in range(2):
        publish(tmp_path / "spool", 1, shape, tmp_path / "trace", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spool", "trace"]
    (tmp_path / "trace" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis"):
        check_target(tmp_path / "trace")
    with pytest.raises(InputError, match="thesis"):
        publish(tmp_path / "spool", 1, shape, tmp_path / "trace", {})
    assert (tmp_path / "trace" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spool", "trace"]


def test_every_request_is_served_once_and_asks_the_same_whoever_serves_it() -> None:
    work = Workload(ranks=3, vocab=50, batch=4, prompt=9)
    numbers = np.concatenate([work.requests(wave, rank) for wave in range(5) for rank in range(3)])
    assert sorted(numbers.tolist()) == list(range(60))
    assert len(set(request_id(np.arange(10000)).tolist())) == 10000
    other = Workload(ranks=1, vocab=50, batch=60, prompt=9)
    mine = np.concatenate([work.prompts(wave, rank) for wave in range(5) for rank in range(3)])
    assert (mine == other.prompts(0, 0)).all()
    assert mine.min() >= 0 and mine.max() < 50
    again = Workload(ranks=3, vocab=50, batch=4, prompt=9, repeat=2)
    assert (again.prompts(3, 1) == work.prompts(1, 1)).all()
