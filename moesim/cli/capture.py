"""`moesim capture`: run a Hugging Face MoE model and record its routing as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def capture(
    model: Annotated[str, typer.Option("--model", help="folder with safetensors, or a model name or config.json, then with random weights")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the trace")],
    text: Annotated[Path | None, typer.Option("--text", help="file whose text is run: by the checkpoint's tokenizer, else byte by byte")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, max=1 << 30, help="prompt tokens in all; default: all of the text, or 4096 Zipf ids")] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, max=1 << 20, help="tokens of a prompt")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, max=4096, help="prompts of a pass")] = 4,
    generate: Annotated[int, typer.Option("--generate", min=0, max=1 << 20, help="tokens to generate after every prompt")] = 0,
    train: Annotated[int, typer.Option("--train", min=0, max=1 << 20, help="training steps (AdamW) after that, recorded as phase train")] = 0,
    weights: Annotated[bool, typer.Option("--weights", help="also record the gate weights")] = False,
    predictions: Annotated[bool, typer.Option("--predictions", help="also record what the next layer's router says to this layer's hidden state")] = False,
    stages: Annotated[bool, typer.Option("--stages/--no-stages", help="record the times of attention, router, experts … of every layer")] = True,
    profile: Annotated[int, typer.Option("--profile", min=0, max=64, help="passes under torch.profiler; the manifest then lists their kernels")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=0, max=1024, help="threads of torch on the CPU; 0: as torch likes")] = 0,
    ranks: Annotated[
        int, typer.Option("--ranks", min=0, max=256, help="processes that the experts are spread over; 0: what torchrun or srun started, else one")
    ] = 0,
    checkpoint_s: Annotated[float, typer.Option("--checkpoint-s", min=0, max=86400, help="seconds after which what was recorded is made readable")] = 60.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of random weights and ids")] = 0,
    skew: Annotated[float, typer.Option("--skew", min=0, max=4, help="tilt of random routers, as in serve-demo")] = 0.3,
    scale: Annotated[str, typer.Option("--scale", help="of random weights; auto: narrow models above 1 GiB; tiny: always; full: never")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Run MODEL on text or random ids and record routing, phases, stage times; prints what recording costs."""
    from moesim.cli.output import emit_json, note
    from moesim.errors import InputError, describe
    from moesim.runtime.capture_ranks import run
    from moesim.runtime.capture_run import Job

    for name, value, allowed in (("--scale", scale, ("auto", "tiny", "full")), ("--dtype", dtype, ("float32", "bfloat16"))):
        if value not in allowed:
            raise InputError(describe("capture", name, value, f"must be one of {', '.join(allowed)}"))
    asked = tokens if tokens is not None else 0 if text is not None else 4096
    job = Job(
        model=model, target=out, text=text, tokens=asked, prompt=prompt, batch=batch, generate=generate, train=train, weights=weights,
        predictions=predictions, stages=stages, profile=profile, seed=seed, skew=skew, scale=scale, dtype=dtype, device=device, threads=threads,
        ranks=ranks, checkpoint_s=checkpoint_s,
    )  # fmt: skip
    report = run(job)
    if report is None:  # not the first of the ranks that a launcher started
        return
    if as_json:
        emit_json(report)
        return
    cost = report["overhead"]
    spread = f" over {report['ranks']} ranks" if report["ranks"] > 1 else ""
    note(f"{report['model']} ({report['weights']}) on {report['device']}{spread}: {report['steps']} steps, {report['rows']} rows, {report['bytes']} B in {out}")
    note(f"recording: {cost['without_ms']:.2f} ms a pass without, {cost['recording_ms']:.2f} ms with ({100 * cost['share']:+.1f} %)")
