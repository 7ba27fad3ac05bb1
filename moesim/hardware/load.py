"""Hardware documents: a library name or a YAML file in, a `Cluster` out.

A library name is `<device>-<devices per node>[x<nodes>]`, like `h100-sxm-8x4`, for any counts. `extends:` (one name or path, or a list) merges
documents from left to right, the document's own keys last; a key set to null is dropped. Paths are relative to the file that names them and
stay inside the folder of the first file. Errors name the file, the key path, the rule and a near match.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import HardwareError, describe
from moesim.files import canonical_json, read_yaml, sha256_hex
from moesim.hardware.cluster import POWER_STATES, Cluster, Device, Link, SizeCurve, Tier

if TYPE_CHECKING:
    from moesim.hardware.schema import CurveDoc, Document

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "library"
MAX_EXTENDS = 16
_NAME = re.compile(r"(?P<device>[a-z0-9][a-z0-9.-]*?)-(?P<devices>\d{1,9})(?:x(?P<nodes>\d{1,9}))?")
_PART = re.compile(r"(?:nodes/)?[a-z0-9][a-z0-9.-]*")

KeyPath = tuple[str, ...]


def library_names() -> tuple[str, ...]:
    """Return the names of the devices in the library, sorted."""
    return tuple(sorted(path.stem for path in LIBRARY.glob("*.yaml")))


def load_cluster(ref: str | Path) -> Cluster:
    """Return the cluster that a library name (any case) or a YAML path describes.

    Raises HardwareError if the name is unknown, or the document breaks a rule.
    """
    text = str(ref)
    if text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text or isinstance(ref, Path):
        path = Path(text)
        origins: dict[KeyPath, str] = {}
        resolver = _Resolver(root=path.resolve().parent, origins=origins)
        return _build(resolver.file(path, ()), origins, str(path), resolver.tables_base)
    device, devices, nodes = split_name(text)
    origins = {}
    resolver = _Resolver(root=LIBRARY, origins=origins)
    node = resolver.file(LIBRARY / f"{device}.yaml", ())
    node.update(devices_per_node=devices, num_nodes=nodes, name=f"{device}-{devices}" + (f"x{nodes}" if nodes > 1 else ""))
    return _build(node, origins, text, resolver.tables_base)


def split_name(text: str) -> tuple[str, int, int]:
    """Split a library name into device, devices per node and nodes."""
    from moesim.hardware.schema import MAX_DEVICES_PER_NODE, MAX_NODES

    lowered, names = text.strip().lower(), library_names()
    form = "a library name is <device>-<devices per node>[x<nodes>], like h100-sxm-8 or h100-sxm-8x4"
    if lowered in names:
        raise HardwareError(f"hardware {text!r}: lacks the number of devices; write {lowered}-1, or {lowered}-8x4 for 4 nodes of 8")
    match = _NAME.fullmatch(lowered)
    if match is None or match["device"] not in names:
        near = difflib.get_close_matches(match["device"] if match else lowered, names, n=1)
        hint = f"did you mean {near[0]}-{match['devices'] if match else 8}?" if near else f"devices: {', '.join(names)}"
        raise HardwareError(f"hardware {text!r}: is not in the library; {hint} ({form}; a file needs the ending .yaml)")
    counts = int(match["devices"]), int(match["nodes"] or 1)
    for key, count, high in zip(("devices per node", "nodes"), counts, (MAX_DEVICES_PER_NODE, MAX_NODES), strict=True):
        if not 1 <= count <= high:
            raise HardwareError(describe(f"hardware {text!r}", key, count, f"must be in 1..{high}", form))
    return match["device"], *counts


class _Resolver:
    """Reads a document and those it extends, and remembers which file every key came from."""

    def __init__(self, *, root: Path, origins: dict[KeyPath, str]) -> None:
        self.root, self.origins, self.count = root, origins, 0
        self.tables_base: Path | None = None

    def file(self, path: Path, stack: tuple[Path, ...]) -> dict[str, Any]:
        """Return the merged content of `path` and of all that it extends."""
        real = path.resolve()
        if real in stack:
            chain = " -> ".join(item.name for item in (*stack[stack.index(real) :], real))
            raise HardwareError(f"{path}: extends: forms a cycle ({chain}); remove one of the links")
        self.count += 1
        if self.count > MAX_EXTENDS:
            raise HardwareError(f"{path}: extends: more than {MAX_EXTENDS} documents; merge some of them")
        library = real.is_relative_to(LIBRARY)
        node = _library_yaml(real) if library else read_yaml(path, error=HardwareError)
        if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
            raise HardwareError(f"{path}: must be a mapping of keys to values at the top level; see `moesim hardware show h100-sxm-8`")
        parts = node.pop("extends", [])
        if isinstance(parts, str):
            parts = [parts]
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise HardwareError(describe(str(path), "extends", parts, "must be a library name, a relative path, or a list of them"))
        merged: dict[str, Any] = {}
        for part in parts:
            _merge(merged, self._part(part, path, (*stack, real)))
        place = path.relative_to(PACKAGE).as_posix() if library else str(path)
        self._remember(node, (), place)
        if "tables" in node:
            self.tables_base = PACKAGE if library else real.parent
        _merge(merged, node)
        return merged

    def _part(self, part: str, path: Path, stack: tuple[Path, ...]) -> dict[str, Any]:
        if not part.endswith((".yaml", ".yml")):
            name = part.lower()
            if _PART.fullmatch(name) and (LIBRARY / f"{name}.yaml").is_file():
                return self.file(LIBRARY / f"{name}.yaml", stack)
            if _NAME.fullmatch(name):
                try:
                    device, devices, nodes = split_name(name)
                except HardwareError as error:
                    raise HardwareError(f"{path}: extends: {error}") from None
                return {**self.file(LIBRARY / f"{device}.yaml", stack), "devices_per_node": devices, "num_nodes": nodes}
            known = [*library_names(), *(f"nodes/{item.stem}" for item in sorted((LIBRARY / "nodes").glob("*.yaml")))]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"names: {', '.join(known)}"
            raise HardwareError(describe(str(path), "extends", part, "is neither in the library nor a .yaml path", hint))
        target = path.parent / part
        if Path(part).is_absolute() or not target.resolve().is_relative_to(self.root):
            raise HardwareError(describe(str(path), "extends", part, f"must be a relative path inside {self.root.name or '/'}/", "copy the file there"))
        return self.file(target, stack)

    def _remember(self, node: Mapping[str, Any], prefix: KeyPath, place: str) -> None:
        for key, value in node.items():
            self.origins[(*prefix, str(key))] = place
            if isinstance(value, dict):
                self._remember(value, (*prefix, str(key)), place)


def _library_yaml(path: Path) -> Any:
    # The library is a few dozen small files that do not change under us; parsing them is most of the load time.
    return _copy(_cached_yaml(path))


@lru_cache(maxsize=128)
def _cached_yaml(path: Path) -> Any:
    return read_yaml(path, error=HardwareError)


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _merge(base: dict[str, Any], node: Mapping[str, Any]) -> None:
    for key, value in node.items():
        if value is None:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif isinstance(value, dict):
            fresh: dict[str, Any] = {}
            _merge(fresh, value)
            base[key] = fresh
        else:
            base[key] = value


def _origin(origins: Mapping[KeyPath, str], loc: KeyPath, place: str) -> str:
    for length in range(len(loc), 0, -1):
        if loc[:length] in origins:
            return origins[loc[:length]]
    return place


def _refuse_unknown_keys(node: Mapping[str, Any], prefix: KeyPath, origins: Mapping[KeyPath, str], place: str) -> None:
    from moesim.hardware.schema import KNOWN_KEYS

    shape = tuple("*" if index == 1 and prefix[0] in ("tiers", "links") else part for index, part in enumerate(prefix))
    known = KNOWN_KEYS.get(shape)
    for key, value in node.items():
        loc = (*prefix, str(key))
        if known is not None and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise HardwareError(f"{_origin(origins, loc, place)}: {'.'.join(loc)}: is not a known key; {hint}")
        if isinstance(value, dict):
            _refuse_unknown_keys(value, loc, origins, place)


def _validate(node: dict[str, Any], origins: Mapping[KeyPath, str], place: str) -> Document:
    from pydantic import ValidationError

    from moesim.hardware.schema import Document

    _refuse_unknown_keys(node, (), origins, place)
    try:
        return Document.model_validate(node)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A union reports every branch; the branch names are no keys of the document.
        first = problems[0]
        loc = tuple(str(part) for part in first["loc"] if isinstance(part, int) or str(part) in _all_keys())
        message = first["msg"].removeprefix("Value error, ")
        key = ".".join(loc)
        file = _origin(origins, loc, place)
        if first["type"] == "missing":
            raise HardwareError(f"{file}: {key}: is missing; add it, or extend a document that has it") from None
        if not loc or isinstance(first["input"], (dict, list)):
            raise HardwareError(f"{file}: {key + ': ' if key else ''}{message}") from None
        raise HardwareError(describe(file, key, first["input"], message)) from None


@lru_cache(maxsize=1)
def _all_keys() -> frozenset[str]:
    from moesim.hardware.schema import KNOWN_KEYS

    return frozenset(key for keys in KNOWN_KEYS.values() for key in keys)


def _warnings(doc: Document, origins: Mapping[KeyPath, str], place: str) -> list[str]:
    claims: list[tuple[KeyPath, float | None, float | None, str]] = []
    for name, link in doc.links:
        if link is not None:
            claims.append((("links", name, "bandwidth"), link.bandwidth, link.datasheet, "B/s"))
    for name, tier in doc.tiers:
        if tier is not None:
            claims += [(("tiers", name, key), getattr(tier, key), tier.datasheet, "B/s") for key in ("bandwidth", "read", "write")]
    claims += [(("device", "peak_flops", name), value, doc.device.datasheet.get(name), "FLOP/s") for name, value in doc.device.peak_flops.items()]
    return [
        f"{_origin(origins, loc, place)}: {'.'.join(loc)} = {value:.6g} {unit} is above the data-sheet value {limit:.6g} {unit}"
        + ("; bandwidths are per direction and per device, data sheets often add both directions" if unit == "B/s" else "; data sheets often count sparsity")
        for loc, value, limit, unit in claims
        if value is not None and limit is not None and value > limit * (1 + 1e-9)
    ]


def _curve(efficiency: float | CurveDoc) -> SizeCurve:
    if isinstance(efficiency, float):
        return SizeCurve(size_bytes=(1.0,), efficiency=(efficiency,))
    return SizeCurve(size_bytes=tuple(efficiency.sizes), efficiency=tuple(efficiency.shares))


def _tables(doc: Document, base: Path | None, file: str) -> Path | None:
    if doc.tables is None:
        return None
    assert base is not None
    folder = (base / doc.tables).resolve()
    if Path(doc.tables).is_absolute() or not folder.is_relative_to(base):
        raise HardwareError(describe(file, "tables", doc.tables, "must be a relative path inside the folder of the document"))
    if not folder.is_dir():
        raise HardwareError(describe(file, "tables", doc.tables, "is not a folder", "convert measured tables with python -m moesim.hardware.convert_tables"))
    return folder


def _power_states(doc: Document) -> dict[str, float] | None:
    watts = {state: getattr(doc.device.power, state) for state in POWER_STATES}
    return {state: value for state, value in watts.items() if value is not None} or None


def _donor(doc: Document, file: str) -> str | None:
    name = doc.calibrated_from
    if name is None:
        return None
    if name not in library_names():
        near = difflib.get_close_matches(name, library_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"devices: {', '.join(library_names())}"
        raise HardwareError(describe(file, "calibrated_from", name, "must be a device of the library", hint))
    if name == doc.name or doc.name.startswith(f"{name}-"):
        raise HardwareError(describe(file, "calibrated_from", name, "must be another device"))
    return name


def _build(node: dict[str, Any], origins: Mapping[KeyPath, str], place: str, base: Path | None) -> Cluster:
    doc = _validate(node, origins, place)
    dumped = doc.model_dump(mode="json")
    # What is not said does not change the fingerprint of the documents that never said it.
    for holder, key in ((dumped, "calibrated_from"), *((dumped["device"]["power"], state) for state in POWER_STATES)):
        if holder[key] is None:
            del holder[key]
    if dumped["nodes_per_leaf"] == 1:
        del dumped["nodes_per_leaf"]
    links = {
        name: Link(
            name=name,
            bandwidth_Bps=link.bandwidth,
            latency_s=link.latency,
            duplex=link.duplex,
            discipline=link.discipline,
            shared_by=doc.devices_per_node if link.shared_by == "node" else min(link.shared_by, doc.devices_per_node),
            efficiency=_curve(link.efficiency),
            kind=link.kind,
            source=link.source,
        )
        for name, link in doc.links
        if link is not None
    }
    tiers = {}
    for name, tier in doc.tiers:
        if tier is not None:
            read, write = tier.read or tier.bandwidth, tier.write or tier.bandwidth
            assert read is not None and write is not None
            tiers[name] = Tier(
                name=name,
                capacity_bytes=tier.capacity,
                read_Bps=read,
                write_Bps=write,
                latency_s=tier.latency,
                attached_to=tier.attached_to,
                shared=tier.shared,
                link=tier.link,
                source=tier.source,
            )
    device = Device(
        name=doc.device.name,
        kind=doc.device.kind,
        peak_flops={str(name): value for name, value in doc.device.peak_flops.items()},
        num_sms=doc.device.num_sms,
        gemm_efficiency=doc.device.gemm_efficiency,
        memory_efficiency=doc.device.memory_efficiency,
        kernel_launch_s=doc.device.kernel_launch,
        power_idle_w=doc.device.power.idle,
        power_peak_w=doc.device.power.peak,
        power_state_w=_power_states(doc),
        source=doc.device.source,
        l2_bytes=doc.device.l2,
    )
    return Cluster(
        name=doc.name,
        device=device,
        tiers=tiers,
        links=links,
        devices_per_node=doc.devices_per_node,
        num_nodes=doc.num_nodes,
        nodes_per_leaf=doc.nodes_per_leaf,
        fabric_oversubscription=doc.fabric_oversubscription,
        tables=_tables(doc, base, _origin(origins, ("tables",), place)),
        calibrated_from=_donor(doc, _origin(origins, ("calibrated_from",), place)),
        price_per_hour=doc.price_per_hour,
        sha256=sha256_hex(canonical_json(dumped)),
        warnings=tuple(_warnings(doc, origins, place)),
        source=place,
    )
