"""Prints trace statistics for people."""

from __future__ import annotations

from typing import Any

from moesim.cli.output import note, table


def print_statistics(report: dict[str, Any]) -> None:
    """Print the tables of `moesim trace stats`."""
    load = report["load"]
    note(f"{', '.join(report['traces'])} on {report['model']}: {report['tokens']:.0f} tokens, top-{report['top_k']} of {report['num_experts']} experts")
    if report["synthetic"]:
        note("synthetic routing: skew, drift and affinity are those of the generator")
    names = [name for name in load["layers"][0] if name != "layer"]
    busiest = sorted(load["layers"], key=lambda row: -row["max_over_mean"])
    shown = busiest if len(busiest) <= 8 else [*busiest[:4], *busiest[-4:]]
    table("load: hottest expert over the mean, and share of the load on the busiest part", ["layer", *names], [_cells(row, ["layer", *names]) for row in shown])
    if len(shown) < len(busiest):
        note(f"({len(busiest)} layers; the four most and the four least skewed are shown)")
    if report["drift"] is not None:
        drift = report["drift"]
        matrix = drift["transfer"] or drift["l1"]
        title = "drift: balance of the row's plan under the column's load" if drift["transfer"] else "drift: share of the load that moved"
        lines = [
            [f"{number}: {name}"[:40], *(f"{value:.3f}" for value in row)] for number, (name, row) in enumerate(zip(drift["windows"], matrix, strict=True))
        ]
        table(title, ["window", *(str(number) for number in range(len(matrix)))], lines)
        if drift["transfer_loss"] is not None:
            note(f"a plan loses {drift['transfer_loss']:.3f} of balance on the other windows on average")
    rows = []
    for key, text in (("affinity", "next layer"), ("coactivation", "same layer")):
        if report[key] is not None:
            found = report[key]
            rows.append((text, *(f"{found[name]:.4f}" for name in ("information_bits", "null_information_bits", "top_share", "null_top_share"))))
    if rows:
        table("what a choice tells about another", ("choices", "bits", "bits, shuffled", "commonest partner", "commonest, shuffled"), rows)
    if report["redundancy"] is not None:
        names = ["extra_slots", "balance_bound", "balance_reached", "gain_per_slot"]
        table(
            f"redundant slots per layer on {report['ranks']} ranks",
            ("slots", "balance at most", "planned", "bound gained per slot"),
            [[str(row["extra_slots"]), *(f"{row[name]:.4f}" for name in names[1:])] for row in report["redundancy"]],
        )


def _cells(row: dict[str, Any], names: list[str]) -> list[str]:
    return [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in names]
