"""Train a small byte-level Mixture-of-Experts model on the text that comes with Python, and record how it routes text that it has not seen.

    python examples/train_byte_moe.py -o my-byte-moe                  # ten minutes on a free core
    moesim trace stats my-byte-moe --model byte-moe

The model is Hugging Face's Qwen3-MoE with the configuration `byte-moe` of moesim's library (6 layers, top-4 of 32 experts); tokens are bytes.
Text is the standard library of the running Python in four kinds: code without docstrings, docstrings, the language reference's topics and
the tables of character encodings. Which files and topics train and which are held out follows from a hash of their names.
The shipped trace `byte-moe` was made by this script with its defaults. It holds expert ids and weights, no text.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.runtime.capture import Capture
from moesim.runtime.capture_run import versions
from moesim.runtime.model import skeleton
from moesim.runtime.spec import read_spec

KINDS = ("code", "docstrings", "topics", "tables")
NO_TEXT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"}
"""Folders of the standard library that are left out: installed or not depending on the distribution, or not written for readers."""
HELD_OUT = 32
"""Of 256: share of files and topics that the model does not see."""
LENGTH, BATCH = 128, 16
"""Bytes of a sequence, and sequences of a training step."""
EVALUATED = 64
"""Sequences that a loss is measured on."""
REQUESTS, NEW = 12, 24
"""Of each kind in the trace: prompts of LENGTH bytes, and bytes generated after each."""


def corpus() -> dict[str, dict[str, bytes]]:
    """Return kind → `train` or `held out` → text."""
    import pydoc_data.topics

    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, dict[str, list[str]]] = {kind: {"train": [], "held out": []} for kind in KINDS}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if set(name.split("/")) & NO_TEXT:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if name.startswith("encodings/"):
            parts["tables"][share(name)].append(text)
            continue
        code, docstrings = apart(text)
        parts["code"][share(name)].append(code)
        parts["docstrings"][share(name)].extend(docstrings)
    for name, text in sorted(pydoc_data.topics.topics.items()):
        parts["topics"][share(name)].append(text)
    return {kind: {use: "\n".join(texts).encode() for use, texts in uses.items()} for kind, uses in parts.items()}


def share(name: str) -> str:
    """Say whether what has this name trains or is held out."""
    return "held out" if hashlib.sha256(name.encode()).digest()[0] < HELD_OUT else "train"


def apart(source: str) -> tuple[str, list[str]]:
    """Return a module's code without its docstrings, and the docstrings."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node, clean=False)):
            first = node.body[0]
            found.append(inspect.cleandoc(text))
            lines[first.lineno - 1 : first.end_lineno] = [""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
    return "\n".join(line for line in lines if line.strip()), found


def fresh_model(seed: int) -> Any:
    """Return the untrained model of the configuration `byte-moe`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(skeleton(read_spec("byte-moe")).config, dtype=torch.float32, attn_implementation="sdpa")


def train(model: Any, text: dict[str, dict[str, bytes]], steps: int, seed: int) -> None:
    """Train on random sequences, each of a random kind, with the loss that keeps experts in use."""
    rng = np.random.Generator(np.random.PCG64(seed))
    pools = [np.frombuffer(text[kind]["train"], np.uint8) for kind in KINDS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2e-3 * min((step + 1) / 50, 0.55 + 0.45 * np.cos(np.pi * step / max(steps, 1))))
    model.train()
    began, window = time.monotonic(), []
    for step in range(steps):
        chosen = [pools[kind] for kind in rng.integers(0, len(KINDS), BATCH)]
        starts = [int(rng.integers(0, len(pool) - LENGTH)) for pool in chosen]
        batch = torch.from_numpy(np.stack([pool[start : start + LENGTH] for pool, start in zip(chosen, starts, strict=True)]).astype(np.int64))
        output = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(float(output.loss.detach()) - model.config.router_aux_loss_coef * float(output.aux_loss.detach()))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1:5d}  loss {np.mean(window[-50:]):.3f} nats a byte  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    model.eval()


def loss_of(model: Any, text: bytes) -> float:
    """Return the mean loss in nats per byte of sequences spread over a text."""
    prompts = spread(text, EVALUATED)
    with torch.inference_mode():
        return float(model(input_ids=prompts, labels=prompts, use_cache=False).loss)


def spread(text: bytes, count: int) -> torch.Tensor:
    """Return int64 [count, LENGTH]: sequences at equal distances."""
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + LENGTH] for start in starts]))


def record(model: Any, text: dict[str, dict[str, bytes]], target: Path, seed: int, provenance: dict[str, Any]) -> int:
    """Serve held-out prompts of one kind after another under a recorder; return the rows recorded."""
    torch.manual_seed(seed)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    with Capture(model, target, name="byte-moe", weights="float16", predictions=True, provenance=provenance) as capture, torch.inference_mode():
        for kind in KINDS:
            prompts = spread(text[kind]["held out"], REQUESTS)
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, use_cache=True)
    return capture.rows


def main() -> None:
    """Train, record, and print what came out as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the trace")
    parser.add_argument("--checkpoint", type=Path, help="folder for the trained model (safetensors)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    text = corpus()
    model = fresh_model(asked.seed)
    began = time.monotonic()
    train(model, text, asked.steps, asked.seed)
    seconds = time.monotonic() - began
    losses = {kind: {use: round(loss_of(model, text[kind][use]), 3) for use in ("train", "held out")} for kind in KINDS}
    if asked.checkpoint is not None:
        model.save_pretrained(asked.checkpoint)
    sources = {kind: {use: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for use, data in text[kind].items()} for kind in KINDS}
    provenance = {
        "source": f"examples/train_byte_moe.py --steps {asked.steps} --seed {asked.seed} --threads {asked.threads}",
        "hardware": f"CPU, {os.cpu_count()} cores, {asked.threads} threads",
        "date": time.strftime("%Y-%m-%d"),
        "seed": asked.seed,
        "versions": {**versions(), "python": platform.python_version(), "numpy": np.__version__},
        "training": {"steps": asked.steps, "bytes": asked.steps * BATCH * LENGTH, "loss_nats_per_byte": losses},
        "text": sources,
        "text_licence": "standard library of CPython, under the PSF licence; ids and weights only, no text is in the trace",
        "kinds": {kind: f"steps {index * NEW}..{(index + 1) * NEW - 1}: one prefill, then decode" for index, kind in enumerate(KINDS)},
        "licence": "Apache-2.0",
    }
    rows = record(model, text, asked.out, asked.seed, provenance)
    print(json.dumps({"trace": str(asked.out), "rows": rows, "training_s": round(seconds, 1), "loss_nats_per_byte": losses}))


if __name__ == "__main__":
    main()
