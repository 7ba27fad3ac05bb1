"""At every point of the protocol a rank or the coordinator may die, stop or fail: one map is left, the old or the new one, and the answers stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from tests.runtime.grid import CELLS, Bench, Cell, note, one_per_point

pytestmark = pytest.mark.dist
QUICK = one_per_point()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    started = Bench(tmp_path_factory.mktemp("grid"))
    yield started
    started.close()


def test_the_grid_is_large_enough_and_names_every_point() -> None:
    assert len(CELLS) == len({cell.name for cell in CELLS}) >= 150
    assert len(QUICK) == 25 and {cell.action for cell in QUICK} == {"raise", "kill", "stop"} and {cell.role for cell in QUICK} == {cell.role for cell in CELLS}


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=() if cell in QUICK else pytest.mark.slow, id=cell.name) for cell in CELLS])
def test_one_map_is_left_and_it_serves_on(bench: Bench, cell: Cell) -> None:
    try:
        happened = bench.run(cell)
    except BaseException as error:
        note("grid", cell=cell.name, failed=f"{type(error).__name__}: {error}"[:300])
        print(bench.abandon())  # what the processes said
        raise
    note("grid", cell=cell.name, phase=cell.phase, role=cell.role, point=cell.point, action=cell.action, **happened)
