"""`moesim demo`: the whole loop on real input – replay a real trace, solve, replay again; serve live, record, solve, apply, compare."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

TRACE, MODEL, HARDWARE = "flame-moe-290m", "flame-moe-290m", "h100-sxm-8"
LIVE_MODEL, LIVE_HARDWARE, LIVE_RANKS = "demo-qwen3-moe", "laptop-4", 4
READY_S = 120.0


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for everything that the demo writes")] = Path("demo-out"),
    live: Annotated[bool, typer.Option("--live/--no-live", help="start the live deployment; needs PyTorch")] = True,
) -> None:
    """Walk the loop once and end with the files that were written."""
    from moesim.cli.output import note

    began = time.perf_counter()
    files = simulate(out)
    if not live:
        note("\nThe live part was left out (--no-live).")
    elif importlib.util.find_spec("torch") is None:
        note('\nThe live part was left out: PyTorch is not installed; add it with pip install "moesim[runtime]" (or make demo WITH_TORCH=1).')
    else:
        files += serve_and_apply(out)
    note(f"\nDone in {time.perf_counter() - began:.0f} s. Files:")
    for path in files:
        note(f"  {path}")


def simulate(out: Path) -> list[Path]:
    """Replay the shipped real trace, solve, replay with the plan, print the gain."""
    from moesim import api
    from moesim.cli.output import note, table

    note(f"1. Replay: real routing of FLAME-MoE-290M on {HARDWARE}, experts placed in order")
    before = api.replay(TRACE, model=MODEL, hardware=HARDWARE)
    note("2. Solve: balance all layers with 8 redundant slots each")
    solution = api.solve(TRACE, model=MODEL, hardware=HARDWARE, redundant=8)
    plan_path = out / "flame-plan.json"
    solution.plan.write(plan_path)
    note("3. Replay with the plan\n")
    after = api.replay(TRACE, model=MODEL, hardware=HARDWARE, plan=solution.plan)
    first, second = before.report, after.report
    rows = [
        ("balance (mean / max tokens per GPU)", f"{first['balance']['mean_over_max']:.3f}", f"{second['balance']['mean_over_max']:.3f}"),
        ("worst layer", f"{first['balance']['worst_layer']:.3f}", f"{second['balance']['worst_layer']:.3f}"),
        ("forward pass, ms", f"{first['step_ms']['mean']:.3f}", f"{second['step_ms']['mean']:.3f}"),
        ("waiting for stragglers, ms", *(f"{r['breakdown_ms'].get('straggler_wait', 0.0):.4f}" for r in (first, second))),
        ("tokens/s", f"{first['tokens_per_s']:,.0f}", f"{second['tokens_per_s']:,.0f}"),
    ]
    table(f"{first['tokens']} tokens, {first['model']} on {first['hardware']}", ["", "in order", "plan"], rows)
    note(f"plan: {solution.report['status']}, balance {solution.report['value']:.4f} of at most {solution.report['bound']:.4f}")
    return [plan_path, *before.write(out / "flame-linear"), *after.write(out / "flame-plan")]


def serve_and_apply(out: Path) -> list[Path]:
    """Start a live deployment, record its routing, solve for it, apply the plan while it serves, print predicted against measured."""
    from moesim import api
    from moesim.cli.output import note, table

    trace, plan_path, report_path = out / "live-trace", out / "live-plan.json", out / "apply.json"
    note(f"\n4. Serve: {LIVE_RANKS} processes (PyTorch, gloo, CPU) answer requests with a {LIVE_MODEL} model")
    with deployment(trace) as ready:
        note(f"   rank pids {ready['pids']}, control port {ready['control']}; recording the first 64 steps")
        _wait_for(trace / "manifest.json")
        note("5. Solve for the recorded routing, and apply while the processes go on serving\n")
        solution = api.solve(str(trace), model=LIVE_MODEL, hardware=LIVE_HARDWARE, predict=False)
        solution.plan.write(plan_path)
        command = [sys.executable, "-m", "moesim", "apply", str(plan_path), "--to", ready["control"], "--yes", "--json"]
        answer = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=os.environ)
        if answer.returncode:
            raise typer.Exit(answer.returncode)
        report = json.loads(answer.stdout)
    from moesim.files import write_atomic

    write_atomic(report_path, json.dumps(report, indent=2) + "\n")
    balance = report["balance"]
    rows = [
        ("balance before, measured", f"{balance['before']:.4f}"),
        ("balance after, predicted", f"{balance['predicted']:.4f}"),
        ("balance after, measured", f"{balance['after']:.4f}"),
        ("prediction error", f"{balance['predicted'] - balance['after']:+.4f}"),
        ("moved", f"{report['moved']['slots']} slots, {report['moved']['bytes']:,} bytes"),
        ("pause", f"{report['pause_ms']:.1f} ms"),
        ("outputs equal", "yes" if report["outputs_equal"] else "no"),
    ]
    table(f"apply: {report['status']}, epoch {report['epoch']}", ["", "value"], rows)
    return [trace / "manifest.json", plan_path, report_path]


@contextmanager
def deployment(trace: Path) -> Iterator[dict[str, Any]]:
    """Run `moesim serve-demo` until the block ends; yields its ready line."""
    words = ["serve-demo", "--ranks", str(LIVE_RANKS), "--model", LIVE_MODEL, "--trace-out", str(trace), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "moesim", *words], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise typer.Exit(process.wait() or 1)
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(path: Path) -> None:
    from moesim.errors import ApplyError

    deadline = time.monotonic() + READY_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise ApplyError(f"{path}: the deployment has recorded nothing for {READY_S:.0f} s; see its messages above")
        time.sleep(0.2)
