"""What a rank does when a peer is gone: leave the broken group, meet the other survivors in a smaller one, serve on.

The coordinator leads, through its store, attempt by attempt: `leave/n` calls everybody out; every survivor answers
`out/n/<seat>` with where it stands; `rebuild/n` names the members, the placement that the journal says is installed, the
smaller one, and the step and wave to go on from; `built/n/<seat>` reports, and after `go/n`
`here/n/<seat>` says that the new numbers of the ranks are in use. A seat is the rank with which a process started. A rank whose placement is one step behind or
ahead of the journal's installs or restores what it has staged first. Requests in flight are served again from the start of
their wave; those of a dead rank are its callers' to send again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.errors import ApplyError
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.agent import Agent, compare
from moesim.runtime.expert_parallel import PeerLost
from moesim.runtime.mesh import Layout, Mesh, join
from moesim.runtime.model import Part, expert_tensor
from moesim.runtime.moves import local_tables
from moesim.runtime.recovery import to_fill
from moesim.runtime.serving import Server
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.spec import ModelSpec

CALL_S = 60.0
"""Longest wait of a survivor for the coordinator's call."""
_broken: list[Mesh] = []
"""Groups with dead members: taking a gloo group down after a peer has gone can end the process."""


class Regroup:
    """One rank's way from a broken group into a smaller one."""

    def __init__(self, store: Any, settings: dict[str, Any], spec: ModelSpec, held: Part, mesh: Mesh, agent: Agent, server: Server, address: str) -> None:
        self.store, self.settings, self.spec, self.held, self.mesh = store, settings, spec, held, mesh
        self.agent, self.server, self.address = agent, server, address
        self.attempt = 0
        self._filled: dict[tuple[int, int], int] = {}
        """(layer row, slot) → expert that an attempt which came to nothing has put there."""

    def after(self, error: PeerLost) -> None:
        """Return when this rank can serve on; raise the reason if it cannot."""
        while True:
            try:
                return self._once(error)
            except PeerLost as cause:
                error = cause
            except RuntimeError as cause:  # the groups are made anew: whoever does not come is the coordinator's to name
                error = PeerLost(f"rank {self.agent.rank}: a peer is gone or silent ({str(cause)[:200]})")

    def _once(self, error: PeerLost) -> None:
        agent, attempt = self.agent, self.attempt
        self.attempt += 1
        failpoints.hit("regroup.out")
        self.store.set(f"out/{attempt}/{agent.seat}", json.dumps({**agent.standing(), "wave": self.server.waves, "reason": str(error)}))
        agent.left(self.attempt, self.settings["timeout_s"])
        call = json.loads(await_key(self.store, f"rebuild/{attempt}", CALL_S))
        if agent.seat not in call["members"]:
            raise error
        begin = time.monotonic()
        old = Plan.from_content(call["base"], "installed plan")
        new = Plan.from_content(call["plan"], "shrunk plan")
        agent.settle(old, call["epoch"])
        place, survivors = call["members"].index(agent.seat), [call["seats"].index(seat) for seat in call["members"]]
        _broken.append(self.mesh)
        if dist.is_initialized():
            dist.destroy_process_group()
        layout, prefix = Layout.of(new), dist.PrefixStore(f"data/{attempt + 1}", self.store)
        self.mesh = join(prefix, layout, rank=place, timeout_s=self.settings["timeout_s"], host=self.address)
        joined_s = time.monotonic() - begin
        self._fill(to_fill(old, survivors, new, place), local_tables(new)[place])
        failpoints.hit("regroup.filled")
        for row, layer in enumerate(self.held.experts):
            layer.rank, layer.group = self.mesh.ep_rank, self.mesh.ep
            layer.use(SlotMap.of(new, row, call["epoch"]))
        self.server.regroup(self.mesh, wave=call["wave"])
        probed = compare(self.server.first_probe, self.server.probe())
        for layer in self.held.experts:
            layer.take_counts()
        answer = {"ok": True, "join_s": joined_s, "seconds": time.monotonic() - begin, **probed}
        self.store.set(f"built/{attempt}/{agent.seat}", json.dumps(answer))
        await_key(self.store, f"go/{attempt}", CALL_S, unless=f"leave/{self.attempt}")
        agent.regroup(rank=place, plan=new, epoch=call["epoch"], step=call["step"])
        self._filled.clear()
        self.store.set(f"here/{attempt}/{agent.seat}", "{}")

    @torch.no_grad()
    def _fill(self, wanted: list[tuple[int, int, int]], table_LQ: np.ndarray) -> None:
        """Load the weights of experts that nobody alive holds: from the checkpoint, or made from the seed, as at the start."""
        stale = [(row, slot, int(table_LQ[row, slot])) for (row, slot), expert in self._filled.items() if table_LQ[row, slot] not in (-1, expert)]
        for layer in self.held.experts:
            if table_LQ.shape[1] > layer.held_slots:
                layer.grow(table_LQ.shape[1])
        state: dict[str, torch.Tensor] = {}
        for row, slot, expert in dict.fromkeys(wanted + stale):
            self._filled[row, slot] = expert
            layer, index = self.held.experts[row], self.held.layer_ids[row]
            for name in layer.tensor_names:
                if self.settings["checkpoint"] is None:
                    layer.tensor(name)[slot] = expert_tensor(self.spec, index, expert, name, layer.shapes[name], layer.is_transposed)
                else:
                    state[f"layers.{index}.experts.{expert}.{name}"] = layer.tensor(name)[slot]
        if state:
            from moesim.runtime.checkpoint import load_some

            load_some(Path(self.settings["checkpoint"]), state, self.spec)


def await_key(store: Any, key: str, timeout_s: float, unless: str = "") -> str:
    """Return the value of `key` as soon as it is there; raise ApplyError after `timeout_s`, PeerLost if the key `unless` is there first."""
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):
        if unless and store.check([unless]):
            raise PeerLost("a peer was lost while the group was rebuilt")
        if time.monotonic() > deadline:
            raise ApplyError(f"the coordinator did not say {key.partition('/')[0]} within {timeout_s:g} s")
        time.sleep(0.003)
    return str(store.get(key).decode())
