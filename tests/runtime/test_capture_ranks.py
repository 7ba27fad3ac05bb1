"""Recording over ranks: what every rank records is joined to what one process would have recorded, with the true mesh; a lost rank takes nothing with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim import api  # noqa: E402
from moesim.errors import ApplyError, InputError, TraceError  # noqa: E402
from moesim.plan import Parallel, linear  # noqa: E402
from moesim.runtime import capture_ranks  # noqa: E402
from moesim.runtime.capture import Capture  # noqa: E402
from moesim.runtime.capture_join import join  # noqa: E402
from moesim.runtime.capture_ranks import run  # noqa: E402
from moesim.runtime.capture_run import Job  # noqa: E402
from moesim.runtime.mesh import Layout  # noqa: E402
from moesim.runtime.mesh import join as join_mesh  # noqa: E402
from moesim.runtime.model import build_part  # noqa: E402
from moesim.runtime.pipeline import Stage  # noqa: E402
from moesim.runtime.spec import read_spec  # noqa: E402
from moesim.traces.manifest import STAGES  # noqa: E402
from moesim.traces.open import open_trace  # noqa: E402
from moesim.traces.repair import repair  # noqa: E402
from moesim.traces.routing_trace import TokenBatch, concatenate  # noqa: E402
from tests.runtime.live import EXPERTS, LAYERS, write_config  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.dist
TOP_K = 4


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def rows_of(trace: Path) -> TokenBatch:
    return concatenate(list(open_trace(str(trace)).batches()))


def job_of(folder: Path, **changes: Any) -> Job:
    return replace(Job(model=str(write_config(folder / "model").parent), target=folder / "t", tokens=128, prompt=8, batch=2, threads=1), **changes)


def by_content(rows: TokenBatch) -> list[bytes]:
    """Return the rows without step, rank and request, in an order of their own."""
    return sorted(
        bytes([phase]) + int(position).to_bytes(4, "big") + route.tobytes()
        for phase, position, route in zip(rows.phase_T, rows.position_T, rows.experts_TLK, strict=True)
    )


def test_ranks_record_together_what_one_process_records_and_replay_gives_each_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    job = job_of(tmp_path, generate=2, predictions=True, weights=True)
    alone, report = run(replace(job, target=tmp_path / "one" / "t")), run(replace(job, ranks=4))
    assert alone is not None and report is not None
    assert report["ranks"] == 4 and report["rows"] == alone["rows"] == 128 + 16 and report["steps"] * 4 == alone["steps"] and report["passes_left_out"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "t"], "the parts are gone"
    one, many, trace = rows_of(tmp_path / "one" / "t"), rows_of(tmp_path / "t"), open_trace(str(tmp_path / "t"))
    assert by_content(one) == by_content(many)
    assert len(set(many.request_T.tolist())) == 16 and many.predicted_TLK is not None and many.weights_TLK is not None
    parallel = trace.facts["parallel"]
    assert {name: parallel[name] for name in ("tp", "ep", "dp", "pp")} == {"tp": 1, "ep": 4, "dp": 4, "pp": 1}
    kernels = trace.tables("kernels")  # type: ignore[misc]
    assert kernels is not None
    experts = kernels["stage"] == STAGES.index("experts")
    counted_LR = np.zeros((len(LAYERS), 4), np.int64)
    np.add.at(counted_LR, (kernels["layer"][experts], kernels["rank"][experts]), kernels["tokens"][experts])
    replayed = api.replay(str(tmp_path / "t"), model=job.model, hardware="laptop-4", times="trace")
    assert replayed.report["times"]["map"] == "recorded"
    assert (replayed.ledger.load_LR.reshape(-1, 4).sum(0) == counted_LR.sum(0)).all() and counted_LR.sum() == report["rows"] * TOP_K * len(LAYERS)


def test_training_over_ranks_is_recorded_as_such(tmp_path: Path) -> None:
    report = run(job_of(tmp_path, ranks=2, train=2, tokens=64))
    rows = rows_of(tmp_path / "t")
    assert report is not None and report["steps"] == 2 + 2 and np.bincount(rows.phase_T).tolist() == [64, 0, 64]
    assert rows.rank_T[rows.phase_T == 2].tolist() == ([0] * 16 + [1] * 16) * 2


def killing(rank: int, after: int, number: int) -> Callable[..., Any]:
    """Return `record` for ranks of which one gets a signal after so many passes."""
    real = vars(capture_ranks)["record"]

    def record(*arguments: Any, **options: Any) -> Any:
        seen: list[str] = []

        def count(text: str) -> None:
            seen.append(text)
            if options["rank"] == rank and len(seen) == after:
                os.kill(os.getpid(), number)

        return real(*arguments, **{**options, "on_progress": count})

    return record


def test_a_killed_rank_leaves_readable_what_the_others_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job_of(tmp_path, ranks=3, tokens=256, checkpoint_s=0.0)
    run(whole)
    wanted = rows_of(tmp_path / "t")
    job = replace(whole, target=tmp_path / "lost")
    monkeypatch.setattr(capture_ranks, "record", killing(1, 3, signal.SIGKILL))
    with pytest.raises(ApplyError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL; .*trace repair.*trace join"):
        run(job)
    assert not (tmp_path / "lost").exists()
    folders = [tmp_path / "lost.ranks" / f"rank-{rank}" for rank in range(3)]
    for folder in folders:
        assert open_trace(str(folder)).provenance["unfinished"] is True and len(rows_of(folder)) >= 3 * 16
    found = join(folders, tmp_path / "joined")
    rows = rows_of(tmp_path / "joined")
    assert found["steps"] == 3 and found["rows"] == len(rows) == 3 * 3 * 16
    assert (rows.experts_TLK == wanted.experts_TLK[: len(rows)]).all() and (rows.rank_T == wanted.rank_T[: len(rows)]).all()
    assert open_trace(str(tmp_path / "joined")).provenance["unfinished"] is True
    with pytest.raises(TraceError, match="folders"):
        join(folders[:2], tmp_path / "two")
    with pytest.raises(TraceError, match="order of the ranks"):
        join([folders[1], folders[0], folders[2]], tmp_path / "mixed")
    (tmp_path / "other").mkdir()
    with pytest.raises(ApplyError):
        run(replace(job, target=tmp_path / "other" / "lost"))
    with pytest.raises(TraceError, match="one run"):
        join([folders[0], tmp_path / "other" / "lost.ranks" / "rank-1", folders[2]], tmp_path / "runs")


def test_sigterm_makes_readable_what_was_recorded(tmp_path: Path) -> None:
    job = job_of(tmp_path)

    def end(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as found:
        run(job, end)
    assert found.value.code == 128 + signal.SIGTERM
    assert open_trace(str(tmp_path / "t")).provenance["unfinished"] is True and len(rows_of(tmp_path / "t")) == 16
    assert repair(tmp_path / "t", tmp_path / "saved").num_rows == 16


def test_what_a_launcher_says_is_taken_or_refused(tmp_path: Path) -> None:
    assert capture_ranks.told({}, 4) is None and capture_ranks.told({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 0) is None
    assert capture_ranks.told({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}, 0) == (2, 4)
    with pytest.raises(InputError, match="WORLD_SIZE"):
        capture_ranks.told({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}, 3)
    with pytest.raises(InputError, match="--device"):
        run(job_of(tmp_path, ranks=2, device="cuda"))


def on_mesh(rank: int, size: int, group: Any, folder: str, config: str) -> None:
    spec = read_spec(config)
    plan = replace(linear(model=spec.name, num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=4, kind="random", seed=3), parallel=Parallel(tp=2, ep=4, dp=2))
    mesh = join_mesh(torch.distributed.FileStore(f"{folder}/mesh", size), Layout.of(plan), rank=rank, timeout_s=20, host="127.0.0.1")
    held = build_part(spec, plan, mesh)
    with Capture(held.model, Path(folder) / f"rank-{rank}", name=spec.name, rank=rank, plan=plan, predictions=True) as capture, torch.inference_mode():
        for step in range(2):
            Stage(held.model, mesh)(torch.arange(14).view(2, 7) + 20 * mesh.replica + step)
    assert capture.incomplete == 0 and all(experts.stages is None for experts in held.experts)


def test_under_tensor_parallelism_every_token_is_recorded_once(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "model"))
    run_ranks(4, on_mesh, str(tmp_path), config)
    join([tmp_path / f"rank-{rank}" for rank in range(4)], tmp_path / "t")
    parallel = open_trace(str(tmp_path / "t")).facts["parallel"]
    assert {name: parallel[name] for name in ("tp", "ep", "dp", "pp")} == {"tp": 2, "ep": 4, "dp": 2, "pp": 1}
    from moesim.runtime.model import build

    model = build(read_spec(config))
    with Capture(model, tmp_path / "one", predictions=True), torch.inference_mode():
        for step in range(2):
            model(input_ids=torch.cat([torch.arange(14).view(2, 7) + 20 * replica + step for replica in range(2)]), use_cache=False)
    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "t")
    assert one.predicted_TLK is not None and many.predicted_TLK is not None and np.array_equal(one.predicted_TLK, many.predicted_TLK)
    assert (one.experts_TLK == many.experts_TLK).all() and (one.position_T == many.position_T).all()
    assert many.rank_T[:28].tolist() == [rank for rank in range(4) for _ in range(7)]
