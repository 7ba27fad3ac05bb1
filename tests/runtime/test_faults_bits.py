"""One bit that flips on the way or in staging is found whichever it is, and nothing of the change is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import ApplyError
from moesim.runtime import failpoints, migration
from moesim.runtime.migration import Migration, live_digests
from moesim.runtime.model import build_distributed
from tests.runtime.inside import SPEC, plan_of
from tests.runtime.ranks import run_ranks

pytestmark = pytest.mark.dist
FLIPS = 100


def _attempts(rank: int, size: int, group: Any, folder: str, point: str) -> tuple[list[str], bool]:
    import torch.distributed as dist

    os.environ["MOESIM_TEST_FAILPOINTS"] = "1"
    old, new = plan_of(), plan_of(1)
    _, layers = build_distributed(SPEC, old, rank=rank, group=group)
    before, generator, found = live_digests(layers), np.random.Generator(np.random.PCG64(7)), []

    def flip(data: np.ndarray) -> None:
        data[generator.integers(data.size)] ^= np.uint8(1 << generator.integers(8))

    migration._flip = flip
    for attempt in range(FLIPS):
        change = Migration(layers, old, new, rank=rank)
        if rank == (0 if point == "stage.sent" else 1):
            failpoints.arm(point, "flip")
        try:
            change.stage(dist.FileStore(f"{folder}/{attempt}", size), "127.0.0.1")
            found.append("")
        except ApplyError as error:
            found.append(str(error))
        change.close()
    return found, live_digests(layers) == before


@pytest.mark.parametrize("point", ["stage.sent", "stage.staged"])
def test_100_of_100_flipped_bits_are_found_and_none_is_installed(point: str, tmp_path: Path) -> None:
    (sender, kept), (receiver, untouched) = run_ranks(2, _attempts, str(tmp_path), point, timeout_s=120)
    assert sender == [""] * FLIPS, "what the sender receives is undamaged"
    assert len(receiver) == FLIPS and all("arrived damaged from rank 0; nothing was installed" in reason for reason in receiver)
    assert kept and untouched
