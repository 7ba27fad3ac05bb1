"""Speed of reading, writing, generating and cutting traces: `python benchmarks/bench_traces.py`.

Times are CPU seconds of one core, so that other load does not count. A record is one token in one layer. The shape is
DeepSeek-V3's (58 layers, top-8 of 256) with Zipf routing, which hardly compresses: a hard case for the reader.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moesim.traces.in_memory import from_batches
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import TraceShape
from moesim.traces.steps import iter_steps
from moesim.traces.writer import write_trace

FLAT = TraceShape(model="v3", num_experts=256, top_k=8, moe_layer_ids=tuple(range(3, 61)))
GROUPED = TraceShape(model="v3", num_experts=256, top_k=8, moe_layer_ids=tuple(range(3, 61)), num_groups=8, top_k_groups=4)
START = """
import time
from moesim.traces.open import open_trace
list(open_trace("flame-moe-290m").batches())
print(time.process_time())
"""


def main() -> None:
    """Print one line per measurement."""
    for shape in (FLAT, GROUPED):
        for kind in ("balanced", "zipf:1.0", "power-law:1.2", "markov:0.7", "topics:8"):
            start = time.process_time()
            next(open_trace(f"synthetic:{kind},tokens=16384", shape=shape).batches())
            print(f"generate 16384 tokens, {shape.num_groups} groups, {kind:14} {time.process_time() - start:6.2f} s")
    trace = open_trace("synthetic:zipf:1.0,tokens=16384,steps=8", shape=FLAT)
    held = from_batches(FLAT, trace.batches(), source="bench")
    records = held.num_rows * FLAT.num_layers
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        write_trace(held, Path(folder) / "t")
        print(f"write {records / (time.process_time() - start) / 1e6:6.1f} M records/s")
        for _ in range(3):
            start = time.process_time()
            for _ in open_trace(str(Path(folder) / "t")).batches():
                pass
            print(f"open, verify and read {records / (time.process_time() - start) / 1e6:6.1f} M records/s")
        stored = open_trace(str(Path(folder) / "t"))
        start = time.process_time()
        for _ in iter_steps(stored, num_ranks=32):
            pass
        print(f"read and cut into steps on 32 ranks {records / (time.process_time() - start) / 1e6:6.1f} M records/s")
    seconds = float(subprocess.run([sys.executable, "-c", START], check=True, capture_output=True, text=True).stdout)
    print(f"start Python, import, open and read the shipped FLAME trace {seconds:.3f} s of CPU time")


if __name__ == "__main__":
    main()
