"""The coordinator of a loop that somebody else runs: `python -m moesim.runtime.companion`, started by `own_loop.attach` beside rank 0.

Settings come as one JSON line on stdin; answers are one line with the port of the ranks' store, and one with the control port once all
ranks have joined. Another line ends it, or the end of stdin, as when rank 0 was killed. It never signals a rank: they are not its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, MoesimError

JOIN_S = 120.0


def main() -> int:
    """Coordinate until stdin ends; return the exit code."""
    from moesim.plan import Plan
    from moesim.runtime.control import ControlServer
    from moesim.runtime.coordinator import Coordinator
    from moesim.runtime.deployment import Deployment
    from moesim.runtime.journal import Journal
    from moesim.runtime.spec import ModelSpec

    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    host, size = settings["host"], settings["size"]
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    holder: list[Coordinator] = []
    control = ControlServer(host, settings["port"], lambda request, progress: holder[0].handle(request, progress), token=os.environ.get("MOESIM_TOKEN", ""))
    deployment = Deployment(host, size)
    _say(store=deployment.store.port)
    with tempfile.TemporaryDirectory(prefix="moesim-attach-") as scratch:
        journal = Journal(Path(settings["journal"] or f"{scratch}/journal"))
        plan = Plan.from_content(settings["plan"], "initial plan")
        journal.append("start", plan=settings["plan"])
        spec = ModelSpec(**{**settings["spec"], "moe_layer_ids": tuple(settings["spec"]["moe_layer_ids"])})
        coordinator = Coordinator(
            deployment, spec=spec, plan=plan, slot_capacity=settings["slot_capacity"], window=settings["window"], journal=journal, publish=lambda: None,
        )  # fmt: skip
        holder.append(coordinator)
        deadline = time.monotonic() + JOIN_S
        while any(status is None for status in deployment.statuses()):
            if ended.wait(0.02) or time.monotonic() > deadline:
                raise ApplyError(f"the {size} ranks did not join within {JOIN_S:g} s")
        deployment.adopt()
        deployment.start()
        control.start()
        _say(control=f"{host}:{control.port}")
        while not (ended.wait(0.05) or coordinator.stop_asked.is_set()):
            pass
        deployment.stopping = True
        with contextlib.suppress(MoesimError):
            if coordinator.stop_asked.is_set() and not ended.is_set():
                deployment.schedule("stop")
                ended.wait(JOIN_S)
        with contextlib.suppress(MoesimError):
            deployment.ask("detach", timeout_s=1.0)
        control.close()
        journal.close()
    return 0


def _say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        code = main()
    except MoesimError as error:
        print(f"moesim: attach: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)
