"""One rank of a calibration: times every case while all ranks time the same one, as in a deployment in which all of them compute at once.

Forked by the process that `calibrate.measure` starts, or started by torchrun. A sample of a kernel is the mean over a block of calls that fills a fixed
time, so that what processes on too few cores take from each other is in it. What is measured is spooled at once, one line of JSON per case: a calibration
that is interrupted goes on where it was. All ranks go through the same cases in the same order, so the lines of `rank-<r>.jsonl` belong together.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

BLOCKS = 5
WARM_UP = 2
SHORT = 0.1
"""Length of a block, relative to the usual one, once the time limit is over."""
TIMEOUT_S = 60
Row = dict[str, Any]


def timed(run: Callable[[], Any], block_s: float, wait: Callable[[], None]) -> list[float]:
    """Return seconds per call of `BLOCKS` blocks; `wait` returns when the device has done what was asked of it."""
    for _ in range(WARM_UP):
        run()
    wait()
    samples = []
    for _ in range(BLOCKS):
        begin = time.perf_counter()
        calls, end = 0, begin + block_s
        while time.perf_counter() < end or not calls:
            run()
            calls += 1
            if calls % 64 == 0:
                wait()  # or a queue of kernels would outlast the block
        wait()
        samples.append((time.perf_counter() - begin) / calls)
    return samples


def timed_together(run: Callable[[], Any], block_s: float, wait: Callable[[], None], agree: Callable[[float], float]) -> list[float]:
    """Return seconds per call of `BLOCKS` blocks with as many calls on all ranks; `agree` returns the largest of the ranks' values."""
    for _ in range(WARM_UP):
        run()
    wait()
    agree(0.0)
    begin = time.perf_counter()
    run()
    wait()
    calls = max(int(block_s / agree(time.perf_counter() - begin)), 1)
    samples = []
    for _ in range(BLOCKS):
        agree(0.0)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        samples.append((time.perf_counter() - begin) / calls)
    return samples


def measure_rank(settings: dict[str, Any], *, rank: int, store: Any, address: tuple[str, int]) -> dict[str, Any]:
    """Measure as the settings say, after the `done` cases that are spooled; return what torch says of the machine.

    store: where the ranks meet; address: its own.
    """
    import torch
    import torch.distributed as dist

    size = int(settings["ranks"])
    torch.set_num_threads(settings["threads"])
    cuda = settings["device"] == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wait = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    group = _group(dist.PrefixStore("calibrate", store), rank, size, settings["host"], device)
    scratch = torch.zeros(1, dtype=torch.float64, device=device)

    def agree(value: float) -> float:
        scratch.fill_(value)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        group.allreduce([scratch], options).wait()
        return float(scratch.item())

    path = Path(settings["folder"], f"rank-{rank}.jsonl")
    kept = path.read_bytes().splitlines(keepends=True)[: settings["done"]] if settings["done"] else []
    path.write_bytes(b"".join(kept))
    with torch.inference_mode(), path.open("a") as spool:
        units = _units(settings, group=group, rank=rank, device=device, wait=wait, agree=agree, address=address)
        for number, unit in enumerate(units):
            if number >= len(kept):
                spool.write(json.dumps(unit()) + "\n")
                spool.flush()
    agree(0.0)
    return _facts(device)


def _units(
    settings: dict[str, Any], *, group: Any, rank: int, device: Any, wait: Callable[[], None], agree: Callable[[float], float],
    address: tuple[str, int],
) -> Iterator[Callable[[], list[Row]]]:  # fmt: skip
    """Yield everything that is measured, in an order that the settings alone decide."""
    from moesim.runtime import calibrate_cases as cases

    size, grid = int(settings["ranks"]), cases.Grid(**settings["grid"])

    def after(limit_s: float) -> Callable[[], bool]:
        """Return what tells, on all ranks alike, whether that much time has passed since now."""
        began = time.monotonic()
        return lambda: agree(time.monotonic() - began) > limit_s

    def row(case: Any, timing: Callable[..., list[float]]) -> list[Row]:
        return [{"kind": case.kind, "keys": dict(case.keys), "samples": timing(case.run, block_s(), wait)}]

    if settings["spec"] is not None:
        from moesim.runtime.calibrate_layers import Rehearsal

        with Rehearsal(settings, group=group, rank=rank, address=address) as rehearsal:
            yield from rehearsal.units(after(settings["rehearsal"]["limit_s"]))
    is_late = after(settings["limit_s"])

    def block_s() -> float:
        """Return how long a block is, the same on all ranks, which begin it together."""
        return float(settings["block_s"]) * (SHORT if is_late() else 1.0)

    for case in cases.kernels(grid, device):
        yield partial(row, case, timed)
    if size > 1:
        together = partial(timed_together, agree=agree)
        shared = [cases.collectives(grid, group, rank, size, device)]
        if settings["spec"] is None:  # else the layers' own exchanges have been timed
            shared.append(cases.exchanges(grid, group, rank, size, device))
        for each in shared:
            for case in each:
                yield partial(row, case, together)


def _group(store: Any, rank: int, size: int, host: str, device: Any) -> Any:
    import torch.distributed as dist

    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=TIMEOUT_S)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    from moesim.runtime.group import gloo_group

    return gloo_group(store, rank=rank, size=size, timeout_s=TIMEOUT_S, host=host)


def _facts(device: Any) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "sms": properties.multi_processor_count, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def main() -> None:
    """Fork the ranks that the settings file asks for and wait; the exit code is 0, or 1 + the first rank that failed.

    What takes seconds to import is imported once, before.
    """
    import torch  # noqa: F401

    from moesim.runtime.worker import die_with_parent

    die_with_parent()
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    if settings["spec"] is not None:
        from moesim.runtime.calibrate_layers import spec_of
        from moesim.runtime.model import skeleton

        skeleton(spec_of(settings))
    running = {_forked(settings, rank): rank for rank in range(settings["ranks"])}
    first = 0
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        if status and not first:
            first = 1 + rank
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(first)


def _forked(settings: dict[str, Any], rank: int) -> int:
    """Fork a rank, which leaves its facts in `facts-<r>.json` and its last words in `stderr-<r>`; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        import torch.distributed as dist

        from moesim.runtime.worker import die_with_parent

        with Path(settings["folder"], f"stderr-{rank}").open("wb") as errors:
            os.dup2(errors.fileno(), 2)
        die_with_parent()

        address = settings["host"], settings["port"]
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
        facts = measure_rank(settings, rank=rank, store=store, address=address)
        Path(settings["folder"], f"facts-{rank}.json").write_text(json.dumps(facts))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
