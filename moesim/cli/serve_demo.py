"""`moesim serve-demo`: a launch on this machine with a default plan, for a first look at a live deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import launch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def serve_demo(
    ranks: Annotated[int, typer.Option("--ranks", min=1, max=64, help="number of worker processes")],
    model: launch.Model,
    port: launch.Port = 0,
    trace_out: launch.TraceOut = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan to start with; default: linear blocks of experts")] = None,
    host: launch.Host = "127.0.0.1",
    journal: launch.JournalFile = None,
    seed: launch.Seed = 0,
    skew: launch.Skew = 0.3,
    scale: launch.Scale = "auto",
    dtype: launch.Dtype = "float32",
    slots_per_rank: launch.SlotsPerRank = None,
    batch: launch.Batch = 8,
    prompt: launch.Prompt = 32,
    decode: launch.Decode = 16,
    repeat: launch.Repeat = 0,
    drift: launch.Drift = 0,
    pace_ms: launch.Pace = 0.0,
    window: launch.Window = None,
    timeout: launch.Timeout = 20.0,
    launcher: launch.Launcher = "fork",
    answer_timeout: launch.AnswerTimeout = 10.0,
    on_death: launch.OnDeath = "stop",
    as_json: launch.AsJson = False,
) -> None:
    """Serve a seeded stream of requests through a random-weight model on RANKS processes; Ctrl-C or `stop` ends it.

    Prints one JSON line {control, pids} when it serves. Random routers alone are nearly balanced, so the demo tilts them:
    all embeddings share a direction that popular experts' router rows answer to (--skew), and the tokens of prompts are
    Zipf-distributed. Loads are then skewed as in real models, by weights and requests; the placement has no part in it.
    """
    from moesim.errors import InputError, describe
    from moesim.plan import Plan, linear
    from moesim.runtime.launch import Settings

    spec = launch.spec_of("serve-demo", model, seed=seed, dtype=dtype, skew=skew, scale=scale, launcher=launcher)
    if plan is not None:
        document = Plan.read(plan)
    else:
        document = linear(model=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids, num_ranks=ranks)
    settings = Settings(
        spec=spec, plan=document, command="serve-demo", launcher=launcher, host=host, port=port, trace_out=trace_out, journal=journal,
        slots_per_rank=slots_per_rank, timeout_s=timeout, answer_s=answer_timeout, window=window, on_death=on_death,
        seed=seed, batch=batch, prompt=prompt, decode=decode, repeat=repeat, drift=drift, pace_ms=pace_ms,
    )  # fmt: skip
    if settings.layout.world != ranks:
        raise InputError(describe(document.source, "num_ranks", document.num_ranks, f"must give the {ranks} ranks of --ranks over all pipeline stages"))
    launch.run(settings, as_json=as_json)
