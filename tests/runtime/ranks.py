"""Runs a function on n forked ranks joined by a gloo group on loopback, and returns what each of them returned.

They are forked from a server that has imported torch and done nothing else: what other tests leave behind in this process, threads above all, is not theirs.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from tests.runtime.live import PRELOAD


def _child(function: Callable[..., Any], rank: int, size: int, path: str, queue: Any, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from moesim.runtime.group import gloo_group

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(path, size)
        group = gloo_group(dist.PrefixStore("data", store), rank=rank, size=size, timeout_s=20)
        queue.put((rank, "ok", function(rank, size, group, *arguments)))
        queue.close()
        queue.join_thread()
    except BaseException as error:
        queue.put((rank, "error", (type(error).__name__, str(error), traceback.format_exc())))
        queue.close()
        queue.join_thread()
    os._exit(0)


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60, raw: bool = False) -> list[Any]:
    """Call `function(rank, size, group, *arguments)` on every rank; raise the first failure unless `raw`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_child, args=(function, rank, size, f"{folder}/store", queue, arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            answers = dict((rank, (kind, value)) for rank, kind, value in (queue.get(timeout=timeout_s) for _ in processes))
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
    if raw:
        return [answers[rank] for rank in range(size)]
    for rank in range(size):
        if answers[rank][0] == "error":
            raise AssertionError("\n".join(f"rank {other}: {value[2]}" for other, (kind, value) in sorted(answers.items()) if kind == "error"))
    return [answers[rank][1] for rank in range(size)]
