"""Runs the fault grid and the random kills, and writes docs/reliability.md from what happened.

`python benchmarks/reliability.py` runs all of it (half an hour on two idle cores) and writes the page; `--results FILE` only writes it, from
the lines that the tests appended to the file named by MOESIM_FAULT_RESULTS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/runtime/test_faults_grid.py", "tests/runtime/test_faults_random.py")
ACTIONS = ("raise", "kill", "stop")
HEAD = """\
# Reliability

What happens to a live deployment when something breaks while a plan is being installed. This page is written by `python benchmarks/reliability.py` from
the results of the tests; do not edit it.

## What is promised

- At any time all ranks run one map: the old one until the decision, the new one after it. The journal's fsynced line is the decision, one
  `compare_set` in the store announces it, and every exchange between ranks opens with (epoch, map), so that a mixture could not be served unnoticed.
- An apply ends in bounded time with exit code 0 (installed or unchanged) or 1 and the reason. A failure before the decision leaves everything as it was; a
  verification that fails, or cannot be carried out, puts the old map back.
- With `--on-death shrink` the ranks that are left meet in a smaller group and serve on: experts that a survivor holds stay where they are, others come
  from the checkpoint, or from the seed where there was none; the probe has to answer as it did at the start. Requests in flight are served again from
  the start of their wave; those of the dead rank are for its callers to send again. Only ranks forked on one machine, without tensor or pipeline
  parallelism, can shrink. By default (`--on-death stop`) all ranks leave, and a restart with the same `--journal` serves the map that it names.
- A rank that hangs is one whose agent, which speaks four times a second, was silent for `--timeout` seconds. It is killed before the others go on.
- If the coordinator dies, the ranks die with it. While it is only stopped they serve on, unless a decision was under way, for which they wait 30 s
  at most before they leave.

## Who may talk to a deployment

The control port binds to loopback unless `--host` says otherwise, and then refuses to start without `MOESIM_TOKEN`; the token is compared in constant time.
The ranks' store (torch's TCPStore) has no authentication: it binds to loopback, except under `--launcher env`, where it listens on the address of rank 0
for the ranks of other machines. Whoever reaches it can read and change everything, so keep it and the ranks' gloo ports on a network of your own.

## What was measured
"""


def main() -> None:
    """Run the tests unless results are given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="lines that the tests have written")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "reliability.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.results or Path(folder) / "results.jsonl"
        if asked.results is None:
            command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *TESTS]
            subprocess.run(command, cwd=ROOT, env={**os.environ, "MOESIM_FAULT_RESULTS": str(path)}, check=False)
        asked.out.write_text(page([json.loads(line) for line in path.read_text().splitlines()]))


def page(lines: list[dict[str, Any]]) -> str:
    """Return the page; of a cell that was run again the last result counts."""
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.runtime.grid import CELLS

    found = {line["cell"]: line for line in lines if line["kind"] == "grid"}
    cells = {name: line for name, line in found.items() if "failed" not in line}
    failed = [line for line in found.values() if "failed" in line]
    tried = [line for line in lines if line["kind"] == "kill"]
    kills = [line for line in tried if "failed" not in line]
    text = [HEAD]
    text.append(
        f"{date.today().isoformat()}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores: 4 gloo processes on "
        "loopback that serve a 3-layer model of 16 experts; one expert per layer moves from one rank to another. "
        f"{len(cells)} of the {len(CELLS)} cells passed, {len(failed)} failed, {len(CELLS) - len(found)} were not run.\n\n"
        "A cell is one fault. *raise*: an exception; *kill*: SIGKILL; *stop*: SIGSTOP, for good in a rank, for half a second in the coordinator. Each "
        "asserts: one epoch and one map in all ranks, the coordinator and the journal; the answers to the same requests unchanged; exit code and "
        "reason; bounded time. An entry is the map afterwards, then how long the apply took until it ended (s) and the ranks that serve on. Where "
        "survivors of the old and of the new map make the same one, it is called new.\n"
    )
    text.append("| phase | fault at | in | raise | kill | stop |\n|---|---|---|---|---|---|")
    for phase, role, point in dict.fromkeys((cell.phase, cell.role, cell.point) for cell in CELLS):
        entries = []
        for action in ACTIONS:
            line = found.get(next(cell.name for cell in CELLS if (cell.role, cell.point, cell.action) == (role, point, action)))
            if line is None:
                entries.append("not run")
            else:
                entries.append("**failed**" if "failed" in line else f"{line['outcome']}, {line['seconds']:.1f}, {line['ranks']}")
        text.append(f"| {phase} | `{point}` | {role} | {' | '.join(entries)} |")
    if failed:
        text.append("\nFailed:\n\n" + "\n".join(f"- {line['cell']}: {line['failed']}" for line in failed))
    ends = Counter(line["outcome"] for line in kills)
    installed = sum(line["exit_code"] == 0 for line in kills)
    text.append(
        f"\n## Random kills\n\n{len(tried)} ranks were killed at random times of an apply under traffic, one after the other in deployments of four until "
        f"two were left: {ends['old']} times the old map was left, {ends['new']} times the new one ({installed} of these applies ended with exit code 0), "
        f"{len(tried) - len(kills)} times something else.\n"
    )
    return "\n".join(text)


if __name__ == "__main__":
    main()
