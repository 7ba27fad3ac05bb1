"""`moesim serve-demo`: a live expert-parallel deployment on this machine, with a control port for `moesim apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def serve_demo(
    ranks: Annotated[int, typer.Option("--ranks", min=1, max=64, help="number of worker processes")],
    model: Annotated[str, typer.Option("--model", help="model name, config.json or its folder; demo-qwen3-moe is small")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="control port; 0: any free one")] = 0,
    trace_out: Annotated[Path | None, typer.Option("--trace-out", help="folder for the routing trace; complete after 64, 256 … steps and at the end")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan to start with; default: linear blocks of experts")] = None,
    host: Annotated[str, typer.Option("--host", help="address to bind; anything but loopback needs MOESIM_TOKEN")] = "127.0.0.1",
    journal: Annotated[Path | None, typer.Option("--journal", help="file of decisions; a restart with it serves the placement it names")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of weights and requests")] = 0,
    skew: Annotated[float, typer.Option("--skew", min=0, max=4, help="tilt of the random routers, a Zipf-like exponent; part of the weights; 0: none")] = 0.3,
    scale: Annotated[str, typer.Option("--scale", help="auto: narrow models above 1 GiB, keeping layers, experts, top-k; tiny: always; full: never")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16")] = "float32",
    slots_per_rank: Annotated[int | None, typer.Option("--slots-per-rank", help="most slots of any later plan; default: 2·⌈E/R⌉")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=512, help="requests in flight per rank")] = 8,
    prompt: Annotated[int, typer.Option("--prompt", min=1, max=4096, help="tokens per prompt")] = 32,
    decode: Annotated[int, typer.Option("--decode", min=0, max=4096, help="decode steps per request")] = 16,
    repeat: Annotated[int, typer.Option("--repeat", min=0, help="start the stream of requests again after this many waves; 0: never")] = 0,
    pace_ms: Annotated[float, typer.Option("--pace-ms", min=0, max=10000, help="shortest time of a step")] = 0.0,
    window: Annotated[int | None, typer.Option("--window", min=1, max=1024, help="steps over which balance is measured; default: two waves")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, max=600, help="seconds after which an exchange with a silent rank fails")] = 20.0,
    launcher: Annotated[str, typer.Option("--launcher", help="fork: start ranks from one process that imports torch once; torchrun: by torchrun")] = "fork",
    answer_timeout: Annotated[float, typer.Option("--answer-timeout", min=1, max=600, help="seconds that a rank has to answer during an apply")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="print nothing but the ready line")] = False,
) -> None:
    """Serve a seeded stream of requests through a random-weight model on RANKS processes; Ctrl-C or `stop` ends it.

    Prints one JSON line {control, pids} when it serves. Random routers alone are nearly balanced, so the demo tilts them:
    all embeddings share a direction that popular experts' router rows answer to (--skew), and the tokens of prompts are
    Zipf-distributed. Loads are then skewed as in real models, by weights and requests; the placement has no part in it.
    """
    import os

    from moesim.cli.output import note
    from moesim.errors import InputError, describe
    from moesim.plan import Plan
    from moesim.runtime.launch import Settings, serve
    from moesim.runtime.spec import read_spec

    choices = (("--scale", scale, ("auto", "tiny", "full")), ("--dtype", dtype, ("float32", "bfloat16")), ("--launcher", launcher, ("fork", "torchrun")))
    for name, value, allowed in choices:
        if value not in allowed:
            raise InputError(describe("serve-demo", name, value, f"must be one of {', '.join(allowed)}"))
    spec = read_spec(model, seed=seed, dtype=dtype, skew=skew, scale=scale)
    settings = Settings(
        spec=spec, ranks=ranks, launcher=launcher, plan=None if plan is None else Plan.read(plan), host=host, port=port, trace_out=trace_out, journal=journal,
        slots_per_rank=slots_per_rank, timeout_s=timeout, answer_s=answer_timeout, window=window,
        seed=seed, batch=batch, prompt=prompt, decode=decode, repeat=repeat, pace_ms=pace_ms,
    )  # fmt: skip
    if not as_json:
        kept = f"{len(spec.moe_layer_ids)} MoE layers of {spec.num_experts} experts, top-{spec.top_k}"
        note(f"starting {ranks} ranks of {spec.name}: {kept}{', widths scaled down' if spec.scaled else ''}")
    code = serve(settings, token=os.environ.get("MOESIM_TOKEN", ""))
    if code:
        raise SystemExit(code)
