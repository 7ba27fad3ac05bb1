"""Experts do not take the optimizer's count of steps along, so a plan is refused where ranks have different ones."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from moesim.errors import ApplyError  # noqa: E402
from moesim.runtime import client  # noqa: E402
from tests.runtime.inside import inside, plan_of  # noqa: E402

pytestmark = pytest.mark.dist


def test_optimizers_that_are_not_at_the_same_step_are_refused(tmp_path: Path) -> None:
    assert pytest.importorskip("transformers", reason="the model needs transformers").AutoConfig  # here, or two threads import it at once
    with inside(tmp_path) as live:
        for rank, step in enumerate((3.0, 4.0)):
            layer = live.layers[rank][1]
            weight = torch.nn.Parameter(layer.down_proj)
            layer.down_proj = weight
            optimizer = torch.optim.Adam([weight])
            optimizer.state[weight] = {"step": torch.tensor(step), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            layer.rows.attach(optimizer)
        with pytest.raises(ApplyError, match=r"layer row 1: down_proj.step is 4.0 on rank 1 and 3.0 on rank 0; let every rank's optimizer take the same steps"):
            client.apply_plan(live.address, plan_of(1))
        assert live.maps() == {live.plan.map_sha256} and live.serves()
        optimizer.state[weight]["step"] -= 1
        assert client.apply_plan(live.address, plan_of(1))["status"] == "installed"
