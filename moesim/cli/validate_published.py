"""`moesim validate --published`: published throughput beside what replaying its setting predicts, for people."""

from __future__ import annotations

from typing import Any


def show_published(only: str, *, strict: bool, seed: int, as_json: bool) -> None:
    """Predict the published figures whose name contains `only` (`all`: every one) and print them."""
    from moesim.api.published.validate import validate_published
    from moesim.cli.output import emit_json, note

    report = validate_published(None if only == "all" else only, strict=strict, seed=seed, progress=lambda name: note(f"replaying {name} …"))
    if as_json:
        emit_json(report)
    else:
        print_published(report)


def print_published(report: dict[str, Any]) -> None:
    """Print the comparison."""
    from moesim.cli.output import note, table

    rows = []
    for row in report["rows"]:
        published = "-" if row["published"] is None else f"{row['published']:,.0f}"
        peers = ", ".join(f"{name} {error:+.1%}" for name, error in row["peers"].items())
        error, verdict = ("-", "") if row["error"] is None else (f"{row['error']:+.1%}", f"{'within' if row['hit'] else 'outside'} {row['within']:.0%}")
        rows.append((row["name"], published, f"{row['predicted']:,.0f}", error, verdict, f"{row['step_ms']:,.1f}", f"{row['balance']:.3f}", peers))
    table("", ["tokens/s per GPU", "published", "predicted", "error", "", "step, ms", "balance", "peers"], rows)
    if report["ratios"]:
        gains = [
            (one["name"], "-" if one["published"] is None else f"{one['published']:.2f}", f"{one['predicted']:.2f}", "in band" if one["hit"] else "out of band")
            for one in report["ratios"]
        ]
        table("\n", ["gain", "published", "predicted", ""], gains)
    for item in report["excluded"]:
        note(f"excluded: {item['name']}: {item['reason']}")
    note(f"{report['rows_scored']} figures scored, nothing fitted on them; routing with skew is synthesised from a summary of real loads")
