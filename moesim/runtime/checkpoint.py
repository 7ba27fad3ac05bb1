"""Checkpoints by logical expert: what a deployment or a training run saves under one placement, any other one can load.

A folder holds safetensors files, written and read by torch.distributed.checkpoint (no pickle), and `checkpoint.json`, written last, with the model's
facts and a digest of every file. Keys are `layers.<layer>.experts.<expert>.<tensor>`, the names in the whole model for all
else, and `optimizer.<state>.<key>` for optimizer state. A replica is saved once, by one of the ranks that hold it; what tensor parallelism
deals out is saved as parts and joined or cut anew on loading. Saving and loading are collectives of all ranks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.errors import InputError, ModelError, MoesimError, describe
from moesim.files import canonical_json, read_json, write_atomic
from moesim.runtime.digest import digest
from moesim.runtime.mesh import Mesh
from moesim.runtime.model import Part
from moesim.runtime.spec import ModelSpec

SCHEMA = "moesim.checkpoint/1"
MANIFEST = "checkpoint.json"
MANIFEST_LIMIT = 16 << 20
TIMEOUT = timedelta(hours=1)
"""Longest wait for the slowest disk; serving groups have seconds."""


def save(folder: Path, held: Part, mesh: Mesh, spec: ModelSpec, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write all ranks' weights, and the state of `optimizer`, to a new `folder`; raise InputError if it is in use, ApplyError if a disk fails."""
    import torch.distributed.checkpoint as dcp

    fresh = folder.parent / f".{folder.name}.new"
    with _group() as group:
        _together(group, lambda: _prepare(folder, fresh) if mesh.rank == 0 else None)
        # The step of a parameter is that of all its experts, and safetensors takes no tensor under two names.
        state = {key: value if value.ndim else value.clone() for key, value, saved in _tensors(held, mesh, optimizer) if saved}
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(fresh), save_distributed=True), process_group=group)
        digests = _together(group, lambda: _digests(fresh, mesh))
        names = sorted({name for state in (optimizer.state.values() if optimizer else ()) for name in state})
        facts = {**_facts(spec), "schema": SCHEMA, "optimizer": names, "files": {name: value for part in digests for name, value in part.items()}}
        _together(group, lambda: _finish(folder, fresh, facts) if mesh.rank == 0 else None)


def load(folder: Path, held: Part, mesh: Mesh, spec: ModelSpec, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill all ranks' weights, and the state of `optimizer`, from `folder`; raise ModelError if it is damaged or of another model."""
    import torch.distributed.checkpoint as dcp

    with _group() as group:
        facts = _together(group, lambda: _read(folder, spec, wants_state=optimizer is not None))[0]
        _together(group, lambda: _verify(folder, facts["files"], mesh))
        if optimizer is not None:
            _make_room(optimizer, facts["optimizer"])
        tensors = list(_tensors(held, mesh, optimizer))
        state: dict[str, torch.Tensor] = {}
        for key, value, _ in tensors:
            state.setdefault(key, value)
        try:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), process_group=group)
        except Exception as cause:  # whatever torch makes of missing keys and other shapes
            reason = " ".join(str(cause).split())[-200:]
            raise ModelError(f"{folder}: does not hold what this model needs ({reason}); give a checkpoint of {spec.name}") from None
        with torch.no_grad():
            for key, value, _ in tensors:  # an expert may be on a rank more than once
                if value is not state[key]:
                    value.copy_(state[key])


def load_some(folder: Path, state: dict[str, torch.Tensor], spec: ModelSpec) -> None:
    """Fill the tensors of `state` from `folder`, one rank by itself; raise ModelError as `load` does. Keys are those of the format."""
    import torch.distributed.checkpoint as dcp

    files = _read(folder, spec, wants_state=False)["files"]
    for name, value in files.items():
        if digest(np.memmap(folder / name, np.uint8, mode="r")).hex() != value:
            raise ModelError(f"{folder / name}: its content is not what was saved; the file was changed or damaged")
    loaded = {key: torch.empty_like(value) for key, value in state.items()}
    try:
        dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as cause:  # whatever torch makes of missing keys and other shapes
        raise ModelError(f"{folder}: does not hold what this model needs ({' '.join(str(cause).split())[-200:]})") from None
    for key, value in loaded.items():
        state[key].copy_(value)


def _tensors(held: Part, mesh: Mesh, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield key, tensor in place, and whether this rank is the one that saves it."""
    from torch.distributed.tensor import DTensor, Shard

    for name, parameter in held.dense.items():
        dim = held.dealt.get(name)
        for prefix, value in _with_state(parameter, optimizer):
            if dim is None or value.ndim == 0:
                yield f"{prefix}{name}", value, mesh.ep_rank == 0
            else:
                yield f"{prefix}{name}", DTensor.from_local(value, mesh.device["tp"], [Shard(dim)], run_check=False), mesh.replica == 0
    for layer, experts in zip(held.layer_ids, held.experts, strict=True):
        table = experts.slot_map.slot_to_expert_S
        for tensor in experts.tensor_names:
            for prefix, value in _with_state(getattr(experts, tensor), optimizer):
                for local, expert in enumerate(table[experts.first : experts.last].tolist()):
                    if expert < 0:
                        continue
                    slots = np.flatnonzero(table == expert)
                    mine = bool(slots[(expert + layer) % slots.size] == experts.first + local)  # replicas take turns
                    row = value if value.ndim == 0 else value[local]
                    yield f"{prefix}layers.{layer}.experts.{expert}.{tensor}", row, mine


def _with_state(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, torch.Tensor]]:
    yield "", parameter.detach()
    for name, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
        if not isinstance(value, torch.Tensor) or (value.ndim and value.shape != parameter.shape):
            rule = "must be a number or have the shape of its parameter"
            raise ModelError(describe("optimizer", f"state {name}", getattr(value, "shape", type(value).__name__), rule, "use Adam, AdamW or SGD"))
        yield f"optimizer.{name}.", value


def _make_room(optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Give every parameter the state that is about to be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {name: torch.zeros(()) if name == "step" else torch.zeros_like(parameter) for name in names}


# --- the folder ---------------------------------------------------------------------------------


def _facts(spec: ModelSpec) -> dict[str, Any]:
    return {"model": spec.name, "num_experts": spec.num_experts, "moe_layer_ids": list(spec.moe_layer_ids), "dtype": spec.dtype}


def _prepare(folder: Path, fresh: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is in use; give a new folder for the checkpoint")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    except OSError as cause:
        raise InputError(f"{fresh}: cannot be written ({cause.strerror or cause}); check the folder and its permissions") from None


def _finish(folder: Path, fresh: Path, facts: dict[str, Any]) -> None:
    write_atomic(fresh / MANIFEST, canonical_json(facts) + b"\n")
    if folder.exists():
        folder.rmdir()
    os.rename(fresh, folder)


def _read(folder: Path, spec: ModelSpec, *, wants_state: bool) -> dict[str, Any]:
    facts = read_json(folder / MANIFEST, limit=MANIFEST_LIMIT, error=ModelError)
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise ModelError(f"{folder / MANIFEST}: is not a checkpoint of schema {SCHEMA!r}")
    for key, wanted in _facts(spec).items():
        if facts.get(key) != wanted:
            raise ModelError(describe(str(folder), key, facts.get(key), f"must be {wanted}", f"give a checkpoint of {spec.name}"))
    files, names = facts.get("files"), facts.get("optimizer")
    if not isinstance(files, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / MANIFEST}: files and optimizer must be an object and a list; the file was damaged")
    if wants_state and not names:
        raise ModelError(f"{folder}: holds no optimizer state; load the weights without an optimizer")
    return facts


def _shards(folder: Path, mesh: Mesh) -> list[str]:
    """Return the files that this rank looks after."""
    return sorted(path.name for path in folder.glob("*.safetensors"))[mesh.rank :: mesh.layout.world]


def _digests(folder: Path, mesh: Mesh) -> dict[str, str]:
    return {name: digest(np.memmap(folder / name, np.uint8, mode="r")).hex() for name in _shards(folder, mesh)}


def _verify(folder: Path, files: dict[str, Any], mesh: Mesh) -> None:
    missing = sorted(set(files) - {path.name for path in folder.glob("*.safetensors")})
    if missing:
        raise ModelError(f"{folder}: {missing[0]!r} is missing; copy the whole folder")
    for name, value in _digests(folder, mesh).items():
        if files.get(name) != value:
            raise ModelError(f"{folder / name}: its content is not what was saved; the file was changed or damaged")


# --- all ranks together ---------------------------------------------------------------------------


class _group:
    """A process group of all ranks with a timeout for disks."""

    def __enter__(self) -> Any:
        self._made = dist.new_group(timeout=TIMEOUT)
        return self._made

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group(self._made)


def _together(group: Any, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on all ranks and return all results; raise the first rank's error on all of them, so that none waits for another in vain."""
    try:
        mine: tuple[Any, MoesimError | None] = work(), None
    except MoesimError as error:
        mine = None, error
    except OSError as cause:
        mine = None, InputError(f"checkpoint: {cause.filename}: {cause.strerror or cause}; free some space, check the disk")
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    for _, failed in answers:
        if failed is not None:
            raise failed
    return [value for value, _ in answers]
