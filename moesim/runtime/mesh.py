"""Who does what in a deployment: R ranks per pipeline stage, tensor-parallel groups inside them, and their process groups.

World rank s·R + d·tp + t is stage s, data-parallel replica d, tensor-parallel index t; R = dp·tp is the plan's `num_ranks`. The
experts of a layer are spread over all R ranks of its stage. Ranks that differ in t only see the same tokens in attention,
and share them out for the experts; ranks that differ in d serve different requests; stages follow one another.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from moesim.errors import PlanError, describe
from moesim.plan import Parallel, Plan

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of parallelism of a deployment, and the arithmetic of its ranks."""

    tp: int = 1
    """Ranks that share the attention of the same tokens."""
    dp: int = 1
    """Groups of them in a stage, each with requests of its own."""
    pp: int = 1
    """Pipeline stages."""

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        """Return the layout of `plan`; raise PlanError if its degrees contradict each other or cannot be served."""
        told, ranks = plan.parallel, plan.num_ranks
        if told.expert_tp > 1:
            raise PlanError(describe(plan.source, "parallel.expert_tp", told.expert_tp, "must be 1: the runtime serves whole experts", "use more ep"))
        if ranks % told.tp:
            raise PlanError(describe(plan.source, "parallel.tp", told.tp, f"must divide num_ranks {ranks}"))
        for name, wanted in (("dp", ranks // told.tp), ("ep", ranks)):
            value = getattr(told, name)
            if value not in (1, wanted):
                raise PlanError(describe(plan.source, f"parallel.{name}", value, f"must be {wanted} where num_ranks is {ranks} and tp {told.tp}"))
        return cls(tp=told.tp, dp=ranks // told.tp, pp=told.pp)

    @property
    def ranks(self) -> int:
        """R, ranks of a stage."""
        return self.dp * self.tp

    @property
    def world(self) -> int:
        """Ranks of all stages."""
        return self.pp * self.ranks

    def stage_of(self, rank: int) -> int:
        """Return the pipeline stage of world rank `rank`."""
        return rank // self.ranks

    def layers(self, stage: int, num_layers: int) -> range:
        """Return the layers of `stage`: equal runs, the first ones longer by one where they do not divide."""
        ends = [num_layers // self.pp * (index + 1) + min(num_layers % self.pp, index + 1) for index in range(-1, self.pp)]
        return range(ends[stage], ends[stage + 1])

    def check_layers(self, num_layers: int, moe_layer_ids: tuple[int, ...], place: str) -> None:
        """Raise PlanError unless every stage has a MoE layer."""
        for stage in range(self.pp):
            held = self.layers(stage, num_layers)
            if not any(layer in held for layer in moe_layer_ids):
                rule = f"leaves stage {stage} (layers {held.start}..{held.stop - 1}) without a MoE layer"
                raise PlanError(describe(place, "parallel.pp", self.pp, rule, "use fewer stages"))


def is_silent(parallel: Parallel, ranks: int) -> bool:
    """Return True if a plan for several ranks leaves all degrees at 1, which says nothing about them."""
    return ranks > 1 and parallel == Parallel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's place and the groups that it is in; a group of one rank is None."""

    layout: Layout
    rank: int
    """World rank."""
    ep: Any
    """The R ranks of the stage."""
    tp: Any = None
    dp: Any = None
    pp: Any = None
    device: Any = None
    """torch's DeviceMesh with the axes pp, dp, tp."""

    @classmethod
    def flat(cls, *, rank: int, size: int, group: Any) -> Mesh:
        """Return the mesh of `size` expert-parallel ranks that meet in `group`."""
        return cls(layout=Layout(dp=size), rank=rank, ep=group, dp=group)

    @property
    def stage(self) -> int:
        """Pipeline stage of this rank."""
        return self.layout.stage_of(self.rank)

    @property
    def ep_rank(self) -> int:
        """Index of this rank in its stage; what plans call a rank."""
        return self.rank % self.layout.ranks

    @property
    def replica(self) -> int:
        """Index of the data-parallel replica."""
        return self.ep_rank // self.layout.tp

    @property
    def tp_index(self) -> int:
        """Index in the tensor-parallel group."""
        return self.rank % self.layout.tp

    @property
    def is_last(self) -> bool:
        """Whether this rank is in the last stage."""
        return self.stage == self.layout.pp - 1

    def share(self, rows: int) -> slice:
        """Return which of `rows` tokens of its tensor-parallel group this rank hands to the experts."""
        size = self.layout.tp
        return slice(rows * self.tp_index // size, rows * (self.tp_index + 1) // size)


def join(store: Any, layout: Layout, *, rank: int, timeout_s: float, host: str) -> Mesh:
    """Meet the other ranks on `store` and return this rank's mesh; every operation of its groups fails after `timeout_s`.

    host: own address; ranks on loopback keep to it, others use the interface that gloo picks or GLOO_SOCKET_IFNAME names.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if host.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world, timeout=limit)
    device = init_device_mesh("cpu", (layout.pp, layout.dp, layout.tp), mesh_dim_names=AXES)
    groups = {name: device.get_group(name) for name in AXES} | {"ep": device["dp", "tp"]._flatten("ep").get_group()}
    for group in groups.values():
        dist.distributed_c10d._set_pg_timeout(limit, group)  # groups of a mesh start with torch's half hour
    return Mesh(layout=layout, rank=rank, device=device, **{name: group if name == "ep" or group.size() > 1 else None for name, group in groups.items()})


def own_address(host: str, port: int) -> str:
    """Return the address of this machine from which `host` is reached."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
