"""What `moesim capture` does: a model, token ids, and a few passes through it under a recorder.

A folder with safetensors is a checkpoint and is run as it is; anything else is a configuration, built with seeded random weights as `serve-demo` builds it.
Prompts are pieces of a text (by the checkpoint's tokenizer, else its bytes) or Zipf-distributed ids. Nothing is fetched from a network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, ModelError, describe
from moesim.files import read_bytes
from moesim.plan import Plan

SCHEMA = "moesim.capture/1"
MAX_TEXT_BYTES = 64 << 20
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to record."""

    model: str
    target: Path
    text: Path | None = None
    tokens: int = 4096
    """Prompt tokens in all."""
    prompt: int = 128
    """Tokens of a prompt."""
    batch: int = 4
    """Prompts of a pass."""
    generate: int = 0
    """Tokens generated after every prompt."""
    train: int = 0
    """Optimizer steps after that."""
    weights: bool = False
    predictions: bool = False
    stages: bool = True
    profile: int = 0
    """Prefill passes under the profiler, whose kernels the manifest then lists."""
    seed: int = 0
    skew: float = 0.3
    scale: str = "auto"
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 0
    """Of torch on the CPU; 0: as torch likes, or one per rank."""
    ranks: int = 0
    """Processes that the experts are spread over; 0: as many as torchrun or srun has started, or this one."""
    checkpoint_s: float = 60.0
    """After as many seconds what was recorded is made readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model, and what is put through it."""

    model: Any
    name: str
    origin: str
    """Of the weights."""
    device: Any
    passes: list[np.ndarray]
    """int64 [B, P] each."""


def load(job: Job) -> Ready:
    """Return the model and the passes of a job."""
    import torch

    device = _device(job.device)
    if job.threads:
        torch.set_num_threads(job.threads)
    model, name, origin, tokenizer = _load(job)
    model.to(device)
    model.eval()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    return Ready(model=model, name=name, origin=origin, device=device, passes=_passes(job, int(model.config.vocab_size), tokenizer))


def record(
    job: Job, ready: Ready, target: Path, *, rank: int = 0, held: Any = None, plan: Plan | None = None, mesh: Any = None, run_id: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Record the passes to `target` and return the report.

    held, plan, mesh: this rank's part of a model that is spread over ranks (a collective of all of them). run_id: the same on all ranks.
    """
    import torch

    from moesim.runtime.capture import Capture, overhead

    model = ready.model
    passes = [torch.from_numpy(part).to(ready.device) for part in ready.passes]
    options: dict[str, Any] = {"name": ready.name, "weights": job.weights, "predictions": job.predictions, "stages": job.stages, "rank": rank, "plan": plan}
    provenance: dict[str, Any] = {
        "model_weights": ready.origin, "input": "text" if job.text else "Zipf-distributed ids", "seed": job.seed, "versions": versions(),
        **({"run": run_id} if run_id else {}),
    }  # fmt: skip

    def forward(part: Any) -> None:
        with torch.inference_mode():
            model(input_ids=part, use_cache=False)

    scratch = target.parent / f".{target.name}.overhead-{os.getpid()}"
    try:
        cost = overhead(model, lambda: forward(passes[0]), scratch, **options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if job.profile:
        from moesim.runtime.capture_profile import profiled

        def window() -> None:
            for index in range(job.profile):
                forward(passes[index % len(passes)])

        provenance["kernels"] = profiled(model, window)
        provenance["profiled_passes"] = job.profile
    began, done = time.perf_counter(), 0
    with Capture(model, target, provenance=provenance, checkpoint_s=job.checkpoint_s, **options) as capture:
        for part in passes:
            if job.generate:
                with torch.inference_mode():
                    model.generate(
                        part, attention_mask=torch.ones_like(part), max_new_tokens=job.generate, min_new_tokens=job.generate, do_sample=False, use_cache=True
                    )
            else:
                forward(part)
            done += part.numel()
            on_progress(f"{done} prompt tokens")
        if job.train:
            _train(model, passes, job.train, on_progress, held, mesh)
    return {
        "schema": SCHEMA, "trace": str(target), "model": ready.name, "weights": ready.origin, "device": str(ready.device), "ranks": 1, "steps": capture.steps,
        "rows": capture.rows, "incomplete_steps": capture.incomplete, "bytes": size_of(target), "wall_s": time.perf_counter() - began,
        "overhead": {"without_ms": cost["without_s"] * 1e3, "recording_ms": cost["recording_s"] * 1e3, "share": cost["overhead"]},
        "stages": "CUDA events" if job.stages and ready.device.type == "cuda" else "host clock" if job.stages else None,
    }  # fmt: skip


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end what runs inside like an error, so that a recorder makes readable what it has."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def versions() -> dict[str, str]:
    """Return the versions of what computed."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, **({"cuda": torch.version.cuda} if torch.version.cuda else {})}


def _device(name: str) -> Any:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(describe("capture", "--device", name, "must be auto, cpu or cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(describe("capture", "--device", name, "needs a GPU, and torch sees none", "use --device cpu"))
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _load(job: Job) -> tuple[Any, str, str, Any]:
    """Return the model, its name, where its weights came from, and a tokenizer or None."""
    import torch

    folder = Path(job.model)
    if not (folder.is_dir() and any(folder.glob("*.safetensors"))):
        from moesim.runtime.model import build
        from moesim.runtime.spec import read_spec

        spec = read_spec(job.model, seed=job.seed, dtype=job.dtype, skew=job.skew, scale=job.scale)
        return build(spec), spec.name, f"random, seed {job.seed}, skew {job.skew:g}{', widths scaled down' if spec.scaled else ''}", None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # pickled weights and code of strangers are never run: safetensors and known architectures only
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        dtype = torch.float32 if job.dtype == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, attn_implementation="eager", **safe)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe) if (folder / "tokenizer.json").is_file() else None
    except Exception as cause:  # transformers raises whatever it likes on a bad checkpoint
        raise ModelError(f"{folder}: transformers cannot load this checkpoint ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})") from None
    return model, folder.resolve().name, "checkpoint", tokenizer


def _passes(job: Job, vocab: int, tokenizer: Any) -> list[np.ndarray]:
    """Return int64 [B, P] per pass: the prompts, in order; what does not fill a prompt is left out."""
    if job.text is not None:
        data = read_bytes(job.text, limit=MAX_TEXT_BYTES, error=InputError)
        if tokenizer is not None:
            ids = np.array(tokenizer(data.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"], dtype=np.int64)
        else:
            ids = np.frombuffer(data, np.uint8).astype(np.int64) % vocab
        ids = ids[: job.tokens] if job.tokens else ids
    else:
        ids = (np.random.Generator(np.random.PCG64(job.seed)).zipf(1.2, job.tokens) - 1) % vocab
    prompt = min(job.prompt, len(ids))
    if not prompt:
        raise InputError(describe(str(job.text or "capture"), "tokens", len(ids), "must be >= 1", "give a text, or --tokens"))
    whole = ids[: len(ids) // prompt * prompt].reshape(-1, prompt)
    return [np.ascontiguousarray(whole[start : start + job.batch]) for start in range(0, len(whole), job.batch)]


def _train(model: Any, passes: list[Any], steps: int, on_progress: Callable[[str], None], held: Any, mesh: Any) -> None:
    import torch

    model.train()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for index in range(steps):
        part = passes[index % len(passes)]
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        if held is not None:
            from moesim.runtime.training import sum_gradients

            sum_gradients(held, mesh)
        optimizer.step()
        optimizer.zero_grad()
        on_progress(f"training step {index + 1} of {steps}")
    model.eval()
