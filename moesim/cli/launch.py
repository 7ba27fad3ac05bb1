"""`moesim launch`: start a deployment with the mesh and the placement of a plan, here or under torchrun and Slurm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesim.runtime.spec import ModelSpec

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# The options of everything that starts a deployment; `serve-demo` has them too.
Model = Annotated[str, typer.Option("--model", help="model name, config.json or its folder; demo-qwen3-moe is small")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="control port; 0: any free one")]
TraceOut = Annotated[Path | None, typer.Option("--trace-out", help="folder for the routing trace; complete after 64, 256 … steps and at the end")]
Host = Annotated[str, typer.Option("--host", help="address of the control port; anything but loopback needs MOESIM_TOKEN")]
JournalFile = Annotated[Path | None, typer.Option("--journal", help="file of decisions; a restart with it serves the placement it names")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seed of weights and requests")]
Skew = Annotated[float, typer.Option("--skew", min=0, max=4, help="tilt of the random routers, a Zipf-like exponent; part of the weights; 0: none")]
Scale = Annotated[str, typer.Option("--scale", help="auto: narrow models above 1 GiB, keeping layers, experts, top-k; tiny: always; full: never")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16")]
SlotsPerRank = Annotated[int | None, typer.Option("--slots-per-rank", help="most slots of any later plan; default: 2·⌈E/R⌉")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=512, help="requests in flight per data-parallel replica")]
Prompt = Annotated[int, typer.Option("--prompt", min=1, max=4096, help="tokens per prompt")]
Decode = Annotated[int, typer.Option("--decode", min=0, max=4096, help="decode steps per request")]
Repeat = Annotated[int, typer.Option("--repeat", min=0, help="start the stream of requests again after this many waves; 0: never")]
Drift = Annotated[int, typer.Option("--drift", min=0, help="other tokens become the popular ones after this many waves; 0: never")]
Pace = Annotated[float, typer.Option("--pace-ms", min=0, max=10000, help="shortest time of a step")]
Window = Annotated[int | None, typer.Option("--window", min=1, max=1024, help="steps over which balance is measured; default: two waves")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, max=600, help="seconds after which an exchange with a silent rank fails")]
Launcher = Annotated[str, typer.Option("--launcher", help="fork: ranks from one process that imports torch once; torchrun: by torchrun; env: already started")]
AnswerTimeout = Annotated[float, typer.Option("--answer-timeout", min=1, max=600, help="seconds that a rank has to answer during an apply")]
OnDeath = Annotated[str, typer.Option("--on-death", help="when a rank dies or hangs: stop, or shrink: the others serve on with all experts")]
AsJson = Annotated[bool, typer.Option("--json", help="print nothing but the ready line")]


def spec_of(command: str, model: str, *, seed: int, dtype: str, skew: float, scale: str, launcher: str) -> ModelSpec:
    """Check the choices that all such commands have, and return the model's specification."""
    from moesim.errors import InputError, describe
    from moesim.runtime.launch import LAUNCHERS
    from moesim.runtime.spec import read_spec

    choices = (("--scale", scale, ("auto", "tiny", "full")), ("--dtype", dtype, ("float32", "bfloat16")), ("--launcher", launcher, LAUNCHERS))
    for name, value, allowed in choices:
        if value not in allowed:
            raise InputError(describe(command, name, value, f"must be one of {', '.join(allowed)}"))
    return read_spec(model, seed=seed, dtype=dtype, skew=skew, scale=scale)


def run(settings: Any, *, as_json: bool) -> None:
    """Start the deployment and stay until it ends."""
    import os

    from moesim.cli.output import note
    from moesim.runtime.launch import serve

    spec, layout = settings.spec, settings.layout
    if not as_json and settings.launcher != "env":
        kept = f"{len(spec.moe_layer_ids)} MoE layers of {spec.num_experts} experts, top-{spec.top_k}"
        mesh = f" as {layout.pp} stages of {layout.dp} × tp {layout.tp}" if layout.tp * layout.pp > 1 else ""
        note(f"starting {layout.world} ranks{mesh} of {spec.name}: {kept}{', widths scaled down' if spec.scaled else ''}")
    code = serve(settings, token=os.environ.get("MOESIM_TOKEN", ""))
    if code:
        raise SystemExit(code)


@app.command()
def launch(
    plan: Annotated[Path, typer.Argument(help="plan: its degrees give the mesh, num_ranks per pipeline stage")],
    model: Model,
    port: Port = 0,
    trace_out: TraceOut = None,
    host: Host = "127.0.0.1",
    journal: JournalFile = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="folder with weights to start with; default: those of --seed")] = None,
    seed: Seed = 0,
    skew: Skew = 0.3,
    scale: Scale = "auto",
    dtype: Dtype = "float32",
    slots_per_rank: SlotsPerRank = None,
    batch: Batch = 8,
    prompt: Prompt = 32,
    decode: Decode = 16,
    repeat: Repeat = 0,
    drift: Drift = 0,
    pace_ms: Pace = 0.0,
    window: Window = None,
    timeout: Timeout = 20.0,
    launcher: Launcher = "fork",
    answer_timeout: AnswerTimeout = 10.0,
    on_death: OnDeath = "stop",
    store_port: Annotated[int | None, typer.Option("--store-port", min=1, max=65535, help="of the ranks' store with env; default: MASTER_PORT + 1")] = None,
    template: Annotated[str | None, typer.Option("--write-template", help="torchrun or slurm: print a script that starts this deployment, and stop")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=4096, help="machines that the script of --write-template uses")] = 1,
    as_json: AsJson = False,
) -> None:
    """Serve MODEL on the mesh of PLAN (pipeline stages × data-parallel replicas × tensor-parallel ranks) with a control port for `moesim apply`.

    Prints one JSON line {control, pids, parallel} when it serves; Ctrl-C ends it. Placement, replicas and dispatch shares change
    live by `moesim apply`; another tp or pp needs a relaunch.
    """
    from moesim.plan import Plan
    from moesim.runtime.launch import Settings

    spec = spec_of("launch", model, seed=seed, dtype=dtype, skew=skew, scale=scale, launcher=launcher)
    settings = Settings(
        spec=spec, plan=Plan.read(plan), launcher=launcher, host=host, port=port, store_port=store_port, trace_out=trace_out, journal=journal,
        checkpoint=checkpoint, slots_per_rank=slots_per_rank, timeout_s=timeout, answer_s=answer_timeout, window=window, on_death=on_death,
        seed=seed, batch=batch, prompt=prompt, decode=decode, repeat=repeat, drift=drift, pace_ms=pace_ms,
    )  # fmt: skip
    if template is not None:
        import sys

        from moesim.runtime.templates import script

        settings.plan.check_model(name=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids)
        sys.stdout.write(script(template, plan=plan, model=model, world=settings.layout.world, nodes=nodes))
        return
    run(settings, as_json=as_json)
