"""DeepSeek EPLB: the three arrays that `rebalance_experts` returns, as JSON lists or int64 arrays in an `.npz` archive.

`physical_to_logical_map` [L, S], `logical_to_physical_map` [L, E, X] (padded with -1, X the most replicas of an expert) and
`expert_count` [L, E]. L counts MoE layers only. An archive is read member by member: header first, sizes
checked, pickles impossible. Reading checks that the three arrays agree.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import PlanError, describe
from moesim.files import MAX_TEXT_BYTES, read_bytes, read_json, write_atomic
from moesim.plan import Plan
from moesim.plan_formats.checks import as_dict, as_rows, need_layers

KEYS = ("physical_to_logical_map", "logical_to_physical_map", "expert_count")


def arrays_of(plan: Plan) -> dict[str, np.ndarray]:
    """Return EPLB's three arrays of a plan; replicas of an expert in slot order."""
    table, count = plan.slot_to_expert_LS.astype(np.int64), plan.replicas_LE
    layers, slots = table.shape
    physical = np.full((layers, plan.num_experts, int(count.max())), -1, dtype=np.int64)
    order = np.argsort(table, axis=1, kind="stable")
    experts = np.take_along_axis(table, order, axis=1)
    first = np.cumsum(count, axis=1) - count
    number = np.arange(slots) - np.take_along_axis(first, experts, axis=1)
    physical[np.arange(layers)[:, None], experts, number] = order
    return dict(zip(KEYS, (table, physical, count), strict=True))


def write(plan: Plan, path: Path, **_: Any) -> None:
    """Write JSON, or an archive if the name ends in `.npz`."""
    arrays = arrays_of(plan)
    if path.suffix != ".npz":
        write_atomic(path, json.dumps({name: array.tolist() for name, array in arrays.items()}) + "\n")
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array, dtype="<i8"), allow_pickle=False)
            # a fixed date keeps the file the same from run to run
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), member.getvalue())
    write_atomic(path, buffer.getvalue())


def read(path: Path, *, num_experts: int, moe_layer_ids: tuple[int, ...], **_: Any) -> np.ndarray:
    """Return [L, S] after checking that the three arrays agree."""
    place = str(path)
    node = _read_archive(path) if path.suffix == ".npz" else read_json(path, error=PlanError)
    node = as_dict(node, place, set(KEYS))
    table = as_rows(node[KEYS[0]], place, KEYS[0], high=num_experts - 1)
    need_layers(len(table), len(moe_layer_ids), path, KEYS[0], "one per MoE layer of the model")
    layers, slots = table.shape
    count = as_rows(node[KEYS[2]], place, KEYS[2], low=1, high=slots, length=num_experts)
    need_layers(len(count), layers, path, KEYS[2], "like the other arrays")
    real = Plan.replicas_LE_of(table, num_experts)
    if (real != count).any():
        layer, expert = np.argwhere(real != count)[0]
        raise PlanError(
            describe(
                place, f"expert_count[{layer}][{expert}]", int(count[layer, expert]), f"must equal the {int(real[layer, expert])} slots that the map gives"
            )
        )
    physical = node[KEYS[1]]
    if not isinstance(physical, list) or len(physical) != layers:
        raise PlanError(f"{place}: {KEYS[1]} must have {layers} layers")
    for layer, rows in enumerate(physical):
        inverse = as_rows(rows, place, f"{KEYS[1]}[{layer}]", low=-1, high=slots - 1)
        if len(inverse) != num_experts:
            raise PlanError(describe(place, f"length of {KEYS[1]}[{layer}]", len(inverse), f"must be {num_experts}, one row per expert"))
        expert, place_in_row = np.nonzero(inverse >= 0)
        listed = inverse[expert, place_in_row]
        if len(listed) != slots or len(np.unique(listed)) != slots or (table[layer, listed] != expert).any():
            raise PlanError(f"{place}: {KEYS[1]}[{layer}] does not invert {KEYS[0]}[{layer}]; the arrays belong to different placements")
    return table


def _read_archive(path: Path) -> dict[str, Any]:
    data = read_bytes(path, error=PlanError)
    result: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist()]
            if sorted(names) != sorted(f"{name}.npy" for name in KEYS):
                raise PlanError(describe(str(path), "arrays", names[:8], f"must be exactly {list(KEYS)}"))
            for info in archive.infolist():
                with archive.open(info) as stream:
                    member = stream.read(MAX_TEXT_BYTES + 1)
                result[info.filename.removesuffix(".npy")] = _read_member(member, path, info.filename)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as cause:
        raise PlanError(f"{path}: is not a readable .npz archive ({cause}); write it again with numpy.savez") from None
    except zlib.error as cause:
        raise PlanError(f"{path}: is damaged ({cause}); write it again with numpy.savez") from None
    return result


def _read_member(member: bytes, path: Path, name: str) -> Any:
    stream = io.BytesIO(member)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)) or len(member) > MAX_TEXT_BYTES:
        raise PlanError(
            describe(str(path), name, f"version {version}, {len(member)} B or more", f"must be a .npy array of version 1 or 2 and <= {MAX_TEXT_BYTES} B")
        )
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.kind not in "iu" or len(shape) not in (2, 3) or math.prod(shape) * dtype.itemsize != len(member) - stream.tell():
        raise PlanError(describe(str(path), name, f"{dtype} {list(shape)}", "must be an integer array with 2 or 3 dimensions and all of its data"))
    flat = np.frombuffer(member, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C").tolist()
