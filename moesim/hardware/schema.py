"""The YAML schema of a hardware document, with human units turned into SI.

Every key is checked: unknown keys, wrong units, numbers out of range and links that do not exist are refused. Bandwidths are per direction
and per device. `datasheet` holds the vendor's figure of the same quantity; the loader warns where a document claims more.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, Tag, model_validator

from moesim.hardware.cluster import POWER_STATES
from moesim.units import parse

SCHEMA = "moesim.hardware/1"
MAX_DEVICES_PER_NODE = 1024
MAX_NODES = 256
DTYPES = ("float32", "bfloat16", "float16", "fp8", "int8", "fp4")


def _quantity(dimension: str, low: float, high: float, *, above: bool = True) -> BeforeValidator:
    def convert(value: Any) -> float:
        if isinstance(value, str) and len(value) > 60:
            raise ValueError("must be a short text, a number with a unit")
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"must be a number with a unit of {dimension}, not a {type(value).__name__}")
        result = parse(value, dimension)
        if result < low or (above and result == low):
            raise ValueError(f"must be {'>' if above else '>='} {low:g}")
        if result > high:
            raise ValueError(f"must be <= {high:g} in SI units; check the unit's prefix")
        return result

    return BeforeValidator(convert)


def _plain_text(value: str) -> str:
    if len(value) > 2000 or not value.isprintable():
        raise ValueError("must be printable text of at most 2000 characters on one line")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number without a unit")
    return value


Bytes = Annotated[float, _quantity("bytes", 0, 1e18)]
Rate = Annotated[float, _quantity("bytes/s", 0, 1e16)]
Seconds = Annotated[float, _quantity("seconds", 0, 3600, above=False)]
Flops = Annotated[float, _quantity("flop/s", 0, 1e20)]
Watts = Annotated[float, _quantity("watts", 0, 1e6)]
Price = Annotated[float, _quantity("dollars/h", 0, 1e6, above=False)]
Text = Annotated[str, AfterValidator(_plain_text)]
Whole = Annotated[int, BeforeValidator(_whole)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CurveDoc(_Strict):
    """Share of the bandwidth reached by message size, linear in log size between the points."""

    sizes: Annotated[list[Bytes], Field(min_length=1, max_length=256)]
    shares: Annotated[list[Share], Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _check(self) -> CurveDoc:
        if len(self.sizes) != len(self.shares):
            raise ValueError(f"has {len(self.sizes)} sizes and {len(self.shares)} shares; give one share per size")
        if any(b <= a for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError("must have sizes in strictly increasing order")
        return self


def _form(value: Any) -> str:
    return "curve" if isinstance(value, (dict, CurveDoc)) else "share"


# Chosen by form, so that an error speaks of the form that was written.
Efficiency = Annotated[Annotated[Share, Tag("share")] | Annotated[CurveDoc, Tag("curve")], Discriminator(_form)]


class PowerDoc(_Strict):
    """Power drawn by one device: at least, at most, and in the states that energy is counted by."""

    idle: Watts | None = None
    peak: Watts | None = None
    compute: Watts | None = None
    memory: Watts | None = None
    communication: Watts | None = None

    @model_validator(mode="after")
    def _check(self) -> PowerDoc:
        states = {name: getattr(self, name) for name in POWER_STATES}
        missing = [name for name, watts in {"idle": self.idle, **states}.items() if watts is None]
        if missing and any(watts is not None for watts in states.values()):
            raise ValueError(f"lacks {', '.join(missing)}; energy needs idle, {', '.join(POWER_STATES)}")
        for name, watts in states.items():
            if watts is not None and self.idle is not None and watts < self.idle:
                raise ValueError(f"has {name} = {watts:g} W below idle = {self.idle:g} W; a state's watts are those of the whole device")
        return self


class DeviceDoc(_Strict):
    """One accelerator or CPU socket."""

    name: Text
    kind: Literal["gpu", "cpu"]
    peak_flops: Annotated[dict[Literal["float32", "bfloat16", "float16", "fp8", "int8", "fp4"], Flops], Field(min_length=1)]
    datasheet: dict[Literal["float32", "bfloat16", "float16", "fp8", "int8", "fp4"], Flops] = Field(default_factory=dict)
    num_sms: Annotated[Whole, Field(ge=1, le=100_000)]
    l2: Bytes | None = None
    gemm_efficiency: Share
    memory_efficiency: Share
    kernel_launch: Seconds
    power: PowerDoc = PowerDoc()
    source: Text = ""


class TierDoc(_Strict):
    """A memory tier; `bandwidth` stands for both directions."""

    capacity: Bytes
    bandwidth: Rate | None = None
    read: Rate | None = None
    write: Rate | None = None
    datasheet: Rate | None = None
    latency: Seconds = 0.0
    attached_to: Literal["device", "node"] = "device"
    shared: StrictBool = False
    link: Literal["scale_up", "scale_out", "host", "disk"] | None = None
    source: Text = ""

    @model_validator(mode="after")
    def _check(self) -> TierDoc:
        if self.bandwidth is None and (self.read is None or self.write is None):
            raise ValueError("needs `bandwidth`, or both `read` and `write`")
        if self.bandwidth is not None and self.read is not None and self.write is not None:
            raise ValueError("has `bandwidth`, `read` and `write`; drop one of them")
        if self.shared and self.attached_to == "device":
            raise ValueError("is shared but attached to a device; set attached_to: node")
        return self


class LinkDoc(_Strict):
    """A kind of port that every device (or group of `shared_by` devices) has."""

    bandwidth: Rate
    datasheet: Rate | None = None
    latency: Seconds
    duplex: StrictBool = True
    discipline: Literal["fair", "serial", "priority"] = "fair"
    shared_by: Annotated[Whole, Field(ge=1, le=MAX_DEVICES_PER_NODE)] | Literal["node"] = 1
    """Devices that share one port, at most all of a node."""
    efficiency: Efficiency = 1.0
    kind: Text = ""
    source: Text = ""


class TiersDoc(_Strict):
    """The memory tiers by name."""

    hbm: TierDoc | None = None
    sram: TierDoc | None = None
    dram: TierDoc | None = None
    nvme: TierDoc | None = None


class LinksDoc(_Strict):
    """The links by name."""

    scale_up: LinkDoc | None = None
    scale_out: LinkDoc | None = None
    host: LinkDoc | None = None
    disk: LinkDoc | None = None


class Document(_Strict):
    """A whole hardware document after `extends` is resolved."""

    format: Literal["moesim.hardware/1"]
    name: Annotated[Text, Field(min_length=1, max_length=200)]
    description: Text = ""
    device: DeviceDoc
    tiers: TiersDoc
    links: LinksDoc = LinksDoc()
    devices_per_node: Annotated[Whole, Field(ge=1, le=MAX_DEVICES_PER_NODE)] = 1
    num_nodes: Annotated[Whole, Field(ge=1, le=MAX_NODES)] = 1
    nodes_per_leaf: Annotated[Whole, Field(ge=1, le=MAX_NODES)] = 1
    """Nodes behind one leaf switch, a rack: they reach each other without the oversubscription."""
    fabric_oversubscription: Annotated[Number, Field(ge=1, le=1000)] = 1.0
    tables: Text | None = None
    calibrated_from: Annotated[Text, Field(max_length=200)] | None = None
    """Library device whose measured tables stand in, transferred by the data sheets, for those that this one lacks."""
    price_per_hour: Price | None = None

    @model_validator(mode="after")
    def _check(self) -> Document:
        memory = "hbm" if self.device.kind == "gpu" else "dram"
        tier = getattr(self.tiers, memory)
        if tier is None or tier.attached_to != "device":
            raise ValueError(f"needs tiers.{memory} attached to the device, because device.kind is {self.device.kind}")
        if self.devices_per_node > 1 and self.links.scale_up is None:
            raise ValueError(f"needs links.scale_up, because devices_per_node is {self.devices_per_node}")
        if self.num_nodes > 1 and self.links.scale_out is None:
            raise ValueError(f"needs links.scale_out, because num_nodes is {self.num_nodes}")
        if self.num_nodes % self.nodes_per_leaf and self.nodes_per_leaf < self.num_nodes:
            raise ValueError(f"has {self.num_nodes} nodes and nodes_per_leaf {self.nodes_per_leaf}; leaves must be equally full")
        for name, item in self.tiers:
            if item is not None and item.link is not None and getattr(self.links, item.link) is None:
                raise ValueError(f"needs links.{item.link}, because tiers.{name}.link names it")
            if item is not None and item.attached_to == "node" and item.link is None:
                raise ValueError(f"needs tiers.{name}.link: a tier of the node is reached through a link (host or disk)")
        return self


KNOWN_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (*Document.model_fields, "extends"),
    ("device",): tuple(DeviceDoc.model_fields),
    ("device", "peak_flops"): DTYPES,
    ("device", "datasheet"): DTYPES,
    ("device", "power"): tuple(PowerDoc.model_fields),
    ("tiers",): tuple(TiersDoc.model_fields),
    ("tiers", "*"): tuple(TierDoc.model_fields),
    ("links",): tuple(LinksDoc.model_fields),
    ("links", "*"): tuple(LinkDoc.model_fields),
    ("links", "*", "efficiency"): tuple(CurveDoc.model_fields),
}
"""Key path (`*`: any name) → keys allowed below it."""
