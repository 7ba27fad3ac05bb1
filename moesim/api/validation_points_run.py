"""A measured closed loop simulated as it was run: so many clients, ten requests each, against the deployment of the row.

Lengths are drawn uniformly from 0.8 to 1 of the nominal ones; rows of a client that is not known (no date in their id) may send the nominal lengths instead,
which the overheads file declares. Deployments and equal rows are computed once. Where the KV cache holds all clients at their longest, blocks are made as
long as a request: no sequence then waits for a block, which changes no time and spares the steps between ends. Tokens, seconds, milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from moesim.api.documents import cluster_of, model_of
from moesim.api.engines import FOLDER, OVERLAP, engine_settings, is_overlapped
from moesim.api.served_routing import served_routing
from moesim.api.serving_deployment import Deployment, Routing, deployment_of, group_with, routing_of
from moesim.api.serving_report import provenance
from moesim.api.validation_points_read import Layout, Point
from moesim.costs.model import ENGINES
from moesim.errors import InputError, MoesimError, describe
from moesim.files import read_json
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request, Requests

REQUESTS_PER_CLIENT = 10
SHORTEST = 0.8
LENGTHS = ("drawn", "nominal")
OVERLAPPED, KERNELS, CACHE = "overlapped", "expert_kernels", "fp8_cache"
ROOMY = True
"""Whether blocks may be as long as requests; tests compare."""
_FP8 = re.compile(r"-fp8(-dynamic)?/*$", re.IGNORECASE)
_DATED = re.compile(r"^\d{4}_\d{2}_\d{2}_|_cfg\d+$")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What an engine of one version spends on the host."""

    step_us: float = 0.0
    """Every step, beside the device's work."""
    front_ms: float = 0.0
    """Every request, before the scheduler sees it: client, HTTP server, tokenizer."""
    sequence_us: float = 0.0
    """Every running sequence of a step."""
    lengths: str = "drawn"
    """Lengths that an unknown client sends: `drawn` or `nominal`; a known one draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Declared overheads: of an engine's version, else of the engine with the same kind of client (`* dated`, `* undated`), else of the engine (`*`).

    Versions of an engine that became overlapped, without rows of their own, have pools of theirs (`* dated overlapped`).
    """

    by_version: Mapping[tuple[str, str], Overhead] = field(default_factory=dict)

    def of(self, point: Point) -> Overhead:
        """Return the overhead that is declared for a row."""
        client = client_of(point)
        pools = (f"{client} {OVERLAPPED}", client) if is_overlapped(point.backend, point.version) else (client,)
        for version in (point.version, *pools, "*"):
            if (point.backend, version) in self.by_version:
                return self.by_version[point.backend, version]
        return Overhead()


def client_of(point: Point) -> str:
    """Return which pool of overheads a row belongs to: rows with a date in their id come from one client, the others from one that is not known."""
    return "* dated" if _DATED.search(point.id) else "* undated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the simulated closed loop says."""

    ttft_ms: float
    tpot_ms: float
    provenance: Mapping[str, float]
    fallbacks: tuple[str, ...] = ()


def read_overheads(path: Path = FOLDER / "overheads.json") -> Overheads:
    """Read declared overheads. Raises InputError if a value is none."""
    node = read_json(path)
    found: dict[tuple[str, str], Overhead] = {}
    try:
        for row in node["overheads"]:
            values = {key: float(row[key]) for key in ("step_us", "sequence_us", "front_ms")}
            if not all(0 <= value < 1e9 for value in values.values()):
                raise ValueError(f"{values} must be >= 0")
            if row["lengths"] not in LENGTHS:
                raise ValueError(f"lengths = {row['lengths']!r} must be one of {', '.join(LENGTHS)}")
            found[str(row["backend"]), str(row["version"])] = Overhead(**values, lengths=row["lengths"])
    except (KeyError, TypeError, ValueError) as cause:
        raise InputError(f"{path}: is no file of overheads ({cause}); write one with `moesim validate --fit-overheads`") from None
    return Overheads(by_version=found)


class Runner:
    """Simulates points on a node type; keeps what it has built."""

    def __init__(
        self,
        hardware: str | Cluster,
        *,
        model: str | MoEModel | None = None,
        requests_trace: str | None = None,
        map_layers: str | None = None,
        overheads: Overheads | None = None,
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        """model: stands for the model of every row. requests_trace: None: as a served model's experts were popular."""
        self.base = cluster_of(hardware)
        self.overheads = overheads if overheads is not None else read_overheads()
        self._model, self._trace, self._map_layers = model, requests_trace, map_layers
        self._strict, self._seed = strict, seed
        self._clusters: dict[int, Cluster] = {self.base.num_nodes: self.base}
        self._models: dict[tuple[str, str, str], MoEModel] = {}
        self._routing: dict[str, Routing | None] = {}
        self._deployments: dict[object, Deployment | MoesimError] = {}
        self._alike: dict[object, Deployment] = {}
        """One deployment of those that differ in degrees and limits only: they share step times."""
        self._done: dict[object, Prediction | MoesimError] = {}

    def model_of(self, point: Point) -> MoEModel:
        """Return the model of a row at the precision that was run: the checkpoint's own where it has one, else what the label says."""
        key = (point.model, point.weights, point.backend)
        if key not in self._models:
            found, rounded = _named(point.model) if self._model is None else (model_of(self._model), False)
            if found.weight_dtype == found.dtype and found.expert_dtype == found.dtype and (rounded or point.weights.startswith("fp8")):
                block = 128 if point.weights == "fp8_block" else None
                found = replace(found, weight_dtype="fp8", weight_block=block, expert_dtype="fp8")
                if block is None and engine_settings().get(point.backend, {}).get(CACHE):
                    found = replace(found, kv_dtype="fp8")
            self._models[key] = found
        return self._models[key]

    def predict(self, point: Point) -> Prediction:
        """Simulate a row. Raises MoesimError if it cannot be: it does not fit, or its degrees do not go together."""
        key = (point.inputs, self._nominal(point), self.overheads.of(point))
        return _once(self._done, key, lambda: self._predict(point))

    # --- parts ----------------------------------------------------------------------------------------------------

    def _nominal(self, point: Point) -> bool:
        return self.overheads.of(point).lengths == "nominal" and client_of(point) == "* undated"

    def _predict(self, point: Point) -> Prediction:
        model, overhead = self.model_of(point), self.overheads.of(point)
        longest = point.prompt + point.output
        prefill = self._deployment(point, model, point.prefill) if point.prefill is not None else None
        deployment = self._deployment(point, model, point.decode)
        chosen = replace(
            deployment.settings.serving,
            clients=point.clients,
            client_us=overhead.front_ms * 1e3,
            sequence_us=overhead.sequence_us,
            instances=point.decode.workers or 1,
            prefill_instances=0 if point.prefill is None else point.prefill.workers or 1,
            schedule_ahead=is_overlapped(point.backend, point.version),
        )
        parts = [_roomy(one, point.clients, longest, chosen, overhead) for one in (deployment, prefill) if one is not None]
        if len(parts) == 2 and parts[0].settings.serving.block_size != parts[1].settings.serving.block_size:
            size = deployment.settings.serving.block_size
            parts = [_roomy(one, 1 << 30, longest, replace(chosen, block_size=size), overhead) for one in (deployment, prefill) if one is not None]
        run = parts[0].run(self._requests(point), prefill=parts[1] if len(parts) == 2 else None)
        if run.refused:
            raise InputError(f"{point.id}: {next(iter(run.refused))}")
        return Prediction(
            ttft_ms=run.ttft.mean * 1e3 + overhead.front_ms,
            tpot_ms=run.tpot.mean * 1e3,
            provenance=provenance(run, deployment),
            fallbacks=tuple(deployment.costs.fallbacks),
        )

    def _requests(self, point: Point) -> Requests:
        count = REQUESTS_PER_CLIENT * point.clients
        generator = np.random.Generator(np.random.PCG64(self._seed))
        share = 1.0 if self._nominal(point) else SHORTEST
        prompts = generator.integers(max(int(np.ceil(share * point.prompt)), 1), point.prompt + 1, count)
        outputs = generator.integers(max(int(np.ceil(share * point.output)), 1), point.output + 1, count)
        rows = [Request(str(index), 0.0, *pair) for index, pair in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True))]
        return Requests(source=point.id, format="synthetic", read=lambda: iter(rows))

    def _deployment(self, point: Point, model: MoEModel, layout: Layout) -> Deployment:
        longest = 1 << int(np.ceil(np.log2(point.prompt + point.output + 1)))
        key = (point.model, point.weights, point.backend, replace(layout, workers=None), longest)
        return _once(self._deployments, key, lambda: self._build(point, model, layout, longest))

    def _build(self, point: Point, model: MoEModel, layout: Layout, longest: int) -> Deployment:
        backend = point.backend if point.backend in ENGINES else "vllm"
        chosen = {name: value for name, value in engine_settings()[backend].items() if name not in (OVERLAP, KERNELS, CACHE)}
        kernel = engine_settings()[backend].get(KERNELS, {}).get(model.expert_dtype, "")
        serving = ServingSettings(**{**chosen, "max_model_len": longest, "pp": layout.pp, "expert_tp": layout.moe_tp if model.moe_layer_ids else 1})
        if layout.dp == 1:
            # All ranks of one attention replica hold all tokens anyway: engines sum the experts' results over them and exchange nothing.
            serving = replace(serving, all2all="gather")
        if model.moe_layer_ids and layout.moe_tp * layout.moe_ep != layout.tp * layout.dp:
            rule = f"must be tp × attention dp = {layout.tp * layout.dp}"
            raise InputError(describe(point.id, "moe_tp × moe_ep", layout.moe_tp * layout.moe_ep, rule))
        settings = replace(Settings(), attention_tp=layout.tp, serving=serving)
        group = group_with(model, tp=layout.tp, dp=layout.dp, expert_tp=serving.expert_tp)
        if model.name not in self._routing:
            trace = self._trace
            self._routing[model.name] = served_routing(model, self._seed) if trace is None else routing_of(trace, model, self._seed, self._map_layers)
        cluster = self._cluster(layout.gpus)
        routing, strict, seed = self._routing[model.name], self._strict, self._seed
        key = (model.name, point.weights, cluster.num_nodes, backend, serving.all2all)
        like = self._alike.get(key)
        self._alike[key] = deployment_of(
            cluster, model, settings, group=group, routing=routing, backend=backend, expert_kernel=kernel, strict=strict, seed=seed, like=like
        )
        return self._alike[key]

    def _cluster(self, gpus: int) -> Cluster:
        """Return as many nodes of the type as a worker needs."""
        nodes = max(-(-gpus // self.base.devices_per_node), 1)
        if nodes not in self._clusters:
            name = re.sub(r"x\d+$", "", self.base.name)
            try:
                self._clusters[nodes] = cluster_of(f"{name}x{nodes}")
            except MoesimError:
                remedy = f"describe a node with devices_per_node: {gpus} or more, or name a node type of the library"
                raise InputError(describe(self.base.name, "nodes", self.base.num_nodes, f"must be {nodes} for {gpus} devices", remedy)) from None
        return self._clusters[nodes]


def _once(known: dict[object, Result | MoesimError], key: object, make: Callable[[], Result]) -> Result:
    """Return what `make` returns or raise what it raises, the first time and every time."""
    if key not in known:
        try:
            known[key] = make()
        except MoesimError as cause:
            known[key] = cause
    found = known[key]
    if isinstance(found, MoesimError):
        raise found
    return found


def _roomy(one: Deployment, clients: int, longest: int, chosen: ServingSettings, overhead: Overhead) -> Deployment:
    """Return a deployment for a run; its blocks hold whole requests where all clients' requests fit at once."""
    own = replace(chosen, pp=one.settings.serving.pp, expert_tp=one.settings.serving.expert_tp)
    tokens, size = one.blocks * own.block_size, min(longest + 1, 4096)
    if ROOMY and clients * -(-(longest + 1) // size) * size <= tokens:
        own, blocks = replace(own, block_size=size), tokens // size
    else:
        blocks = one.blocks
    return replace(one, settings=replace(one.settings, host_overhead_us=overhead.step_us, serving=own), blocks=blocks)


def _named(name: str) -> tuple[MoEModel, bool]:
    """Return the model of a repository name, and whether the name alone says that its weights were rounded to FP8."""
    try:
        return model_of(name), False
    except MoesimError as cause:
        bare = _FP8.sub("", name)
        if bare == name:
            raise InputError(f"{cause}; the column of models may also hold the path of a config.json") from None
        return model_of(bare), True
