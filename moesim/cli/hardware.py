"""`moesim hardware list | show H | check H`: what the library has, what a description says, whether it holds."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True, help="List, show and check hardware.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Ref = Annotated[str, typer.Argument(metavar="H", help="A library name like h100-sxm-8x4, or a YAML file.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """List the devices of the library."""
    from moesim.cli.output import emit_json, note, table
    from moesim.hardware import load_cluster
    from moesim.hardware.load import library_names
    from moesim.units import format_bytes

    clusters = {name: load_cluster(f"{name}-1") for name in library_names()}
    if json:
        devices = [
            {"name": name, "device": one.device.name, "kind": one.device.kind, "memory_bytes": one.memory.capacity_bytes, "tables": one.tables is not None}
            for name, one in clusters.items()
        ]
        emit_json({"schema": "moesim.hardware-list/1", "devices": devices})
        return
    rows = [
        (name, format_bytes(one.memory.capacity_bytes), f"{one.memory.read_Bps / 1e9:.0f} GB/s", "measured" if one.tables else "roofline", one.device.name)
        for name, one in clusters.items()
    ]
    table("Devices", ("name", "memory", "bandwidth", "costs", "device"), rows)
    note("A cluster is <name>-<devices per node>[x<nodes>], for any counts: h100-sxm-8, h100-sxm-8x4.")


@app.command()
def show(ref: Ref, json: Json = False) -> None:
    """Show a cluster in SI units, with the source of every value."""
    from dataclasses import asdict

    from moesim.cli.output import emit_json, note, table
    from moesim.hardware import load_cluster
    from moesim.hardware.tables import table_names
    from moesim.units import format_bytes, format_time

    cluster = load_cluster(ref)
    if json:
        report = asdict(cluster)
        report["tables"] = list(table_names(cluster))
        emit_json({"schema": "moesim.hardware-show/1", "num_ranks": cluster.num_ranks, **report})
        return
    device = cluster.device
    peaks = ", ".join(f"{name} {value / 1e12:g}" for name, value in device.peak_flops.items())
    note(f"{cluster.name}: {cluster.num_nodes} node(s) of {cluster.devices_per_node} x {device.name}, {device.num_sms} SMs, TFLOP/s {peaks}")
    rate = "{:g} GB/s".format
    tiers = [
        (name, format_bytes(tier.capacity_bytes), rate(tier.read_Bps / 1e9), rate(tier.write_Bps / 1e9), tier.attached_to, tier.link or "-")
        for name, tier in cluster.tiers.items()
    ]
    table("\nMemory tiers", ("tier", "capacity", "read", "write", "attached to", "link"), tiers)
    links = [
        (name, rate(one.bandwidth_Bps / 1e9), f"{max(one.efficiency.efficiency):g}", format_time(one.latency_s), one.shared_by, one.kind)
        for name, one in cluster.links.items()
    ]
    table("\nLinks, per direction and port", ("link", "bandwidth", "reached", "latency", "devices a port", "kind"), links)
    note("\nSources")
    for name, source in [("device", device.source), *((key, part.source) for part_of in (cluster.tiers, cluster.links) for key, part in part_of.items())]:
        note(f"  {name}: {source or 'not stated'}")
    names = table_names(cluster)
    note(f"\nMeasured tables: {', '.join(names) if names else 'none; costs come from the roofline or another device'}\nsha256 {cluster.sha256}")
    for warning in cluster.warnings:
        note(f"warning: {warning}")


@app.command()
def check(ref: Ref, json: Json = False) -> None:
    """Check a description against the schema, its tables and the data sheets; exit 2 if it breaks a rule."""
    from moesim.cli.output import emit_json, note
    from moesim.hardware import load_cluster
    from moesim.hardware.tables import table_metadata, table_names

    cluster = load_cluster(ref)
    rows = {stem: int(table_metadata(cluster, stem)["num_rows"]) for stem in table_names(cluster)}
    if json:
        emit_json(
            {
                "schema": "moesim.hardware-check/1",
                "name": cluster.name,
                "ok": True,
                "warnings": list(cluster.warnings),
                "tables": rows,
                "num_ranks": cluster.num_ranks,
                "sha256": cluster.sha256,
            }
        )
        return
    for warning in cluster.warnings:
        note(f"warning: {warning}")
    note(f"{cluster.name}: ok, {cluster.num_ranks} ranks, {len(rows)} tables with {sum(rows.values())} rows, {len(cluster.warnings)} warning(s)")
