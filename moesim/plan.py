"""The plan document: where every expert lives, in how many copies, and how the model is split.

A slot is a physical expert, an expert a logical one. Shapes: L MoE layers, S slots, E experts, R ranks.
`slot_to_expert_LS` holds the logical expert of every slot (-1: the slot is empty); `slot_rank_S` the rank
that owns the slot. JSON on disk, stamped with the SHA-256 of its content; arrays are read-only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.counts import normal_counts, present_LE
from moesim.errors import PlanError, describe
from moesim.files import canonical_json, read_json, sha256_hex, write_atomic

SCHEMA = "moesim.plan/1"
MAX_SLOTS = 1 << 20
STATUSES = ("OPTIMAL", "FEASIBLE", "TIME_LIMIT", "BASELINE", "IMPORTED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Degrees of parallelism; their meaning is that of the serving engines (DP is attention data parallelism)."""

    tp: int = 1
    """Attention tensor-parallel ranks per replica of the attention."""
    ep: int = 1
    """Ranks that share the experts of a layer."""
    dp: int = 1
    """Attention data-parallel groups inside the expert-parallel group."""
    pp: int = 1
    """Pipeline stages."""
    expert_tp: int = 1
    """Ranks that share one expert."""

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "dp", "pp", "expert_tp"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(describe("plan", f"parallel.{name}", value, "must be an integer >= 1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An expert placement with its parallel degrees and its proof."""

    model: str
    """Name of the model the plan was made for."""
    num_experts: int
    """E, logical experts per MoE layer (the most, where layers differ)."""
    moe_layer_ids: tuple[int, ...]
    """Index in the model (from 0) of every row of `slot_to_expert_LS`."""
    slot_to_expert_LS: np.ndarray
    """int32 [L, S]: logical expert of every slot, -1 where the slot is empty."""
    slot_rank_S: np.ndarray
    """int32 [S]: rank that owns every slot, non-decreasing."""
    num_ranks: int
    """R, ranks of the expert-parallel group."""
    parallel: Parallel = field(default_factory=Parallel)
    share_LS: np.ndarray | None = None
    """float64 [L, S]: share of its expert's tokens that a slot serves; None splits equally."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """Hook name → policy name, for the parts of a run that decide while it runs."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the model, hardware and trace that the plan was made for."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """What the solver reported: objective, value, bound, gap, status, solver, version."""
    source: str = "plan"
    """Where the plan came from, for error messages; not part of its identity."""
    experts_L: tuple[int, ...] | None = None
    """Experts of every row of `slot_to_expert_LS` where they differ; None: E in all of them."""

    def __post_init__(self) -> None:
        place = self.source
        table = np.array(self.slot_to_expert_LS, dtype=np.int32)
        ranks = np.array(self.slot_rank_S, dtype=np.int32)
        if table.ndim != 2 or table.size == 0:
            raise PlanError(describe(place, "slot_to_expert shape", table.shape, "must be [layers, slots], both > 0"))
        layers, slots = table.shape
        if not 1 <= self.num_experts <= 65536:
            raise PlanError(describe(place, "num_experts", self.num_experts, "must be in 1..65536"))
        if len(self.moe_layer_ids) != layers:
            raise PlanError(describe(place, "moe_layer_ids", len(self.moe_layer_ids), f"must have one entry per row, {layers}"))
        if any(b <= a for a, b in zip(self.moe_layer_ids, self.moe_layer_ids[1:], strict=False)) or self.moe_layer_ids[0] < 0:
            raise PlanError(describe(place, "moe_layer_ids", self.moe_layer_ids, "must be increasing and >= 0"))
        if ranks.shape != (slots,):
            raise PlanError(describe(place, "slot_rank length", ranks.shape[0], f"must equal the number of slots, {slots}"))
        if self.num_ranks < 1 or ranks[0] < 0 or ranks[-1] >= self.num_ranks or bool((np.diff(ranks) < 0).any()):
            raise PlanError(describe(place, "slot_rank", [int(ranks.min()), int(ranks.max())], f"must be non-decreasing within 0..{self.num_ranks - 1}"))
        if table.min() < -1 or table.max() >= self.num_experts:
            layer, slot = np.argwhere((table < -1) | (table >= self.num_experts))[0]
            raise PlanError(
                describe(
                    place,
                    f"slot_to_expert[{layer}][{slot}]",
                    int(table[layer, slot]),
                    f"must be an expert in 0..{self.num_experts - 1}, or -1 for an empty slot",
                )
            )
        object.__setattr__(
            self,
            "experts_L",
            normal_counts(self.experts_L, self.num_experts, layers, lambda value, rule: PlanError(describe(place, "experts_per_layer", value, rule))),
        )
        present = self.present_LE
        replicas = self.replicas_LE_of(table, self.num_experts)
        if self.experts_L is not None and (replicas[~present] > 0).any():
            layer, expert = np.argwhere((replicas > 0) & ~present)[0]
            rule = f"must be below the {self.experts_L[layer]} experts of that layer, or -1 for an empty slot"
            raise PlanError(describe(place, f"slot_to_expert[{layer}][{int((table[layer] == expert).argmax())}]", int(expert), rule))
        missing = present & (replicas == 0)
        if missing.any():
            layer, expert = np.argwhere(missing)[0]
            raise PlanError(
                f"{place}: layer {layer} has no slot for expert {expert} ({int(missing.sum())} missing in all); every expert needs at least one slot"
            )
        if self.share_LS is not None:
            object.__setattr__(self, "share_LS", self._checked_share(place, table))
        table.setflags(write=False)
        ranks.setflags(write=False)
        object.__setattr__(self, "slot_to_expert_LS", table)
        object.__setattr__(self, "slot_rank_S", ranks)

    def _checked_share(self, place: str, table: np.ndarray) -> np.ndarray:
        share = np.array(self.share_LS, dtype=np.float64)
        if share.shape != table.shape:
            raise PlanError(describe(place, "share shape", share.shape, f"must equal that of slot_to_expert, {table.shape}"))
        if not np.isfinite(share).all() or (share < 0).any() or (share[table < 0] != 0).any():
            raise PlanError(f"{place}: shares must be finite, >= 0, and 0 on empty slots")
        total = np.zeros((table.shape[0], self.num_experts))
        layer, slot = np.nonzero(table >= 0)
        np.add.at(total, (layer, table[layer, slot]), share[layer, slot])
        off = np.abs(total - 1) * self.present_LE
        if off.max() > 1e-6:
            row, expert = divmod(int(off.argmax()), self.num_experts)
            raise PlanError(describe(place, f"shares of layer {row}, expert {expert}", float(total[row, expert]), "must sum to 1"))
        share.setflags(write=False)
        return share

    @staticmethod
    def replicas_LE_of(table_LS: np.ndarray, num_experts: int) -> np.ndarray:
        """Return int64 [L, E], the number of slots of every expert."""
        layers = table_LS.shape[0]
        keys = (table_LS + np.arange(layers)[:, None] * (num_experts + 1) + 1).ravel()
        return np.bincount(keys, minlength=layers * (num_experts + 1)).reshape(layers, num_experts + 1)[:, 1:]

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.slot_to_expert_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """S, slots per layer over all ranks."""
        return int(self.slot_to_expert_LS.shape[1])

    @property
    def present_LE(self) -> np.ndarray:
        """bool [L, E]: experts that the layer has."""
        return present_LE(self.experts_L, self.num_experts, len(self.moe_layer_ids))

    @property
    def replicas_LE(self) -> np.ndarray:
        """int64 [L, E]: number of slots of every expert."""
        return self.replicas_LE_of(self.slot_to_expert_LS, self.num_experts)

    def shares_LS(self) -> np.ndarray:
        """Return float64 [L, S]: the share of its expert's tokens that every slot serves."""
        if self.share_LS is not None:
            return self.share_LS
        table = self.slot_to_expert_LS
        share = 1.0 / np.take_along_axis(self.replicas_LE, np.maximum(table, 0), axis=1)
        return np.where(table >= 0, share, 0.0)

    def rank_load_LR(self, load_LE: np.ndarray) -> np.ndarray:
        """Return float64 [L, R]: expected load of every rank for expert loads `load_LE` [L, E]."""
        slot_load = np.take_along_axis(np.asarray(load_LE, dtype=np.float64), np.maximum(self.slot_to_expert_LS, 0), axis=1) * self.shares_LS()
        result = np.zeros((self.num_layers, self.num_ranks))
        np.add.at(result.T, self.slot_rank_S, slot_load.T)
        return result

    def check_model(self, *, name: str, num_experts: int, moe_layer_ids: Sequence[int], experts_L: tuple[int, ...] | None = None) -> None:
        """Raise PlanError if the plan was not made for a model with these experts and MoE layers."""
        if self.num_experts != num_experts:
            raise PlanError(
                describe(
                    self.source,
                    "num_experts",
                    self.num_experts,
                    f"must equal the {num_experts} experts of {name}",
                    f"the plan was made for {self.model}; solve again for {name}",
                )
            )
        if self.moe_layer_ids != tuple(moe_layer_ids):
            raise PlanError(
                describe(
                    self.source,
                    "moe_layer_ids",
                    list(self.moe_layer_ids),
                    f"must equal the MoE layers of {name}, {list(moe_layer_ids)}",
                    f"the plan was made for {self.model}; solve again for {name}",
                )
            )
        if self.experts_L != experts_L:
            rule = f"must equal the experts of the MoE layers of {name}, {experts_L or num_experts}"
            remedy = f"the plan was made for {self.model}; solve again for {name}"
            raise PlanError(describe(self.source, "experts_per_layer", self.experts_L or self.num_experts, rule, remedy))

    # --- identity and files ---------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """Return the JSON object of the plan without its stamp."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "num_experts": self.num_experts,
            **({} if self.experts_L is None else {"experts_per_layer": list(self.experts_L)}),
            "moe_layer_ids": list(self.moe_layer_ids),
            "num_ranks": self.num_ranks,
            "parallel": {name: getattr(self.parallel, name) for name in Parallel.__dataclass_fields__},
            "slot_rank": self.slot_rank_S.tolist(),
            "slot_to_expert": self.slot_to_expert_LS.tolist(),
            "share": None if self.share_LS is None else self.share_LS.tolist(),
            "policies": dict(self.policies),
            "fingerprints": dict(self.fingerprints),
            "result": dict(self.result),
        }

    @property
    def sha256(self) -> str:
        """SHA-256 of the plan's content."""
        return sha256_hex(canonical_json(self.content()))

    @property
    def map_sha256(self) -> str:
        """SHA-256 of the placement alone: what a running deployment has to agree on."""
        table = np.ascontiguousarray(self.slot_to_expert_LS, dtype="<i4")
        ranks = np.ascontiguousarray(self.slot_rank_S, dtype="<i4")
        counts = () if self.experts_L is None else (self.experts_L,)
        return sha256_hex(repr((table.shape, self.num_experts, self.num_ranks, *counts)).encode() + table.tobytes() + ranks.tobytes())

    def stamped(self) -> dict[str, Any]:
        """Return the JSON object of the plan with its stamp, as `from_content` takes it."""
        content = self.content()
        return {**content, "sha256": sha256_hex(canonical_json(content))}

    def write(self, path: Path) -> None:
        """Write the plan to `path`, whole or not at all."""
        write_atomic(path, canonical_json(self.stamped()) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan; raise PlanError if it is damaged, of a newer schema, or breaks a rule."""
        node = read_json(Path(path), error=PlanError)
        return cls.from_content(node, str(path))

    @classmethod
    def from_content(cls, node: Any, place: str) -> Plan:
        """Build a plan from its JSON object; `place` names the source in errors."""
        if not isinstance(node, dict):
            raise PlanError(f"{place}: must be a JSON object with schema {SCHEMA!r}")
        if node.get("schema") != SCHEMA:
            raise PlanError(describe(place, "schema", node.get("schema"), f"must be {SCHEMA!r}", "import other formats with `moesim plan import`"))
        node = dict(node)
        stamp = node.pop("sha256", None)
        required = {
            "schema",
            "model",
            "num_experts",
            "moe_layer_ids",
            "num_ranks",
            "parallel",
            "slot_rank",
            "slot_to_expert",
            "share",
            "policies",
            "fingerprints",
            "result",
        }
        if set(node) - {"experts_per_layer"} != required:
            extra, missing = sorted(set(node) - required), sorted(required - set(node))
            raise PlanError(
                f"{place}: unknown keys {extra}, missing keys {missing}; a plan has exactly {sorted(required)}, and experts_per_layer where it differs"
            )
        if stamp != sha256_hex(canonical_json(node)):
            raise PlanError(describe(place, "sha256", stamp, "must be the SHA-256 of the content", "the file was changed or damaged; solve again"))
        parallel = node["parallel"]
        if not isinstance(parallel, dict) or set(parallel) != set(Parallel.__dataclass_fields__):
            raise PlanError(describe(place, "parallel", parallel, f"must have the keys {list(Parallel.__dataclass_fields__)}"))
        table = _int_array(node["slot_to_expert"], place, "slot_to_expert", 2)
        return cls(
            model=_typed(node["model"], str, place, "model"),
            num_experts=_typed(node["num_experts"], int, place, "num_experts"),
            moe_layer_ids=tuple(_int_array(node["moe_layer_ids"], place, "moe_layer_ids", 1).tolist()),
            num_ranks=_typed(node["num_ranks"], int, place, "num_ranks"),
            parallel=Parallel(**parallel),
            slot_rank_S=_int_array(node["slot_rank"], place, "slot_rank", 1),
            slot_to_expert_LS=table,
            share_LS=None if node["share"] is None else _float_array(node["share"], place, "share"),
            policies=_typed(node["policies"], dict, place, "policies"),
            fingerprints=_typed(node["fingerprints"], dict, place, "fingerprints"),
            result=_typed(node["result"], dict, place, "result"),
            experts_L=tuple(_int_array(node["experts_per_layer"], place, "experts_per_layer", 1).tolist()) if "experts_per_layer" in node else None,
            source=place,
        )

    def with_result(self, **result: Any) -> Plan:
        """Return the same plan with another solver report."""
        return replace(self, result=result)


def linear(
    *,
    model: str,
    num_experts: int,
    moe_layer_ids: Sequence[int],
    num_ranks: int,
    kind: str = "linear",
    seed: int = 0,
    experts_L: tuple[int, ...] | None = None,
) -> Plan:
    """Return a placement without replicas: `linear` blocks, `round_robin`, or a seeded `random` permutation per layer.

    Ranks get ⌈E/R⌉ or ⌊E/R⌋ slots when E is not a multiple of R; a layer with fewer experts (`experts_L`) fills the first slots of every rank alike.
    """
    if kind not in ("linear", "round_robin", "random"):
        raise PlanError(describe("placement", "kind", kind, "must be linear, round_robin or random"))
    slot_rank = np.sort(np.arange(num_experts) % num_ranks).astype(np.int32)
    place_in_rank_S = np.arange(num_experts) - np.searchsorted(slot_rank, slot_rank)
    generator = np.random.Generator(np.random.PCG64(seed))
    table = np.full((len(moe_layer_ids), num_experts), -1)
    for row, count in zip(table, experts_L or (num_experts,) * len(table), strict=True):
        order = np.arange(count)
        if kind == "round_robin":
            order = np.argsort(order % num_ranks, kind="stable")
        elif kind == "random":
            order = generator.permutation(count)
        row[place_in_rank_S < np.bincount(np.arange(count) % num_ranks, minlength=num_ranks)[slot_rank]] = order
    return Plan(
        model=model,
        num_experts=num_experts,
        moe_layer_ids=tuple(moe_layer_ids),
        slot_to_expert_LS=table,
        slot_rank_S=slot_rank,
        num_ranks=num_ranks,
        experts_L=experts_L,
        parallel=Parallel(ep=num_ranks, dp=num_ranks),
        result={"solver": kind, "status": "BASELINE"},
        source=f"--placement {kind}",
    )


def _typed(value: Any, kind: type, place: str, key: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(describe(place, key, value, f"must be of type {kind.__name__}"))
    return value


def _int_array(value: Any, place: str, key: str, ndim: int) -> np.ndarray:
    array = _regular_array(value, place, key)
    if array.ndim != ndim or array.size == 0 or array.size > MAX_SLOTS * 8 or array.dtype.kind not in "iu":
        raise PlanError(describe(place, key, f"{array.dtype} {list(array.shape)}", f"must be a non-empty list of integers with {ndim} dimension(s)"))
    if array.min() < -1 or array.max() >= 2**31 - 1:
        raise PlanError(describe(place, key, [int(array.min()), int(array.max())], "must hold integers in -1..2^31-2"))
    return array


def _float_array(value: Any, place: str, key: str) -> np.ndarray:
    array = _regular_array(value, place, key)
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        raise PlanError(describe(place, key, f"{array.dtype} {list(array.shape)}", "must be a list of rows of numbers"))
    return array.astype(np.float64)


def _regular_array(value: Any, place: str, key: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise PlanError(f"{place}: {key} must be a list of rows of equal length") from None
