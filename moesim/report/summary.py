"""The report of a replay: the JSON object that users rely on, read off the ledger and the sums of a run."""

from __future__ import annotations

from typing import Any

from moesim.costs.energy import declared
from moesim.sim.build import ProgramBuilder
from moesim.sim.replay import ReplayRun
from moesim.traces.routing_trace import RoutingTrace
from moesim.traces.steps import sharding


def replay_report(run: ReplayRun, routing: RoutingTrace, builder: ProgramBuilder, tokens_per_step: int | None, wall_s: float) -> dict[str, Any]:
    """Return the report of a replay; its keys are stable."""
    model, cluster, plan, settings = builder.model, builder.cluster, builder.plan, builder.settings
    ledger = run.ledger
    breakdown = {label: seconds * 1e3 for label, seconds in ledger.mean_breakdown_s().items()}
    wait_s = ledger.total_s.get("straggler_wait", 0.0)
    simulated = ledger.simulated_s
    token_layers = max(run.sums.token_layers, 1)
    return {
        "schema": "moesim.replay/1",
        "model": model.name,
        "hardware": cluster.name,
        "placement": {"solver": str(plan.result.get("solver", "")), "slots": plan.num_slots, "ranks": plan.num_ranks, "plan_sha256": plan.sha256},
        "settings": settings.report(),
        "simulated_s": simulated,
        "wall_s": wall_s,
        "steps": run.steps,
        "tokens": run.tokens,
        "tokens_per_s": run.tokens / simulated if simulated else 0.0,
        "step_ms": ledger.step_ms(),
        "breakdown_ms": breakdown,
        "balance": run.sums.balance.as_dict(),
        "bytes": {"local": run.local_bytes, "intra_node": run.intra_node_bytes, "inter_node": run.inter_node_bytes, **run.link_bytes},
        "traffic": {"distinct_remote_ranks": run.sums.copies_remote / token_layers, "distinct_remote_nodes": run.sums.copies_remote_node / token_layers},
        "cache": run.cache or {"hits": 0, "late_hits": 0, "misses": 0, "useless_prefetches": 0, "hit_rate": None},
        "stall_s": {"straggler": wait_s, **run.stall_s},
        "memory": {tier: sum(uses.values()) for tier, uses in run.memory.items()},
        "memory_by_use": run.memory,
        "change": run.change,
        "requests": {"ttft_ms": None, "tpot_ms": None, "latency_ms": None},
        "routing": {
            "source": routing.source,
            "kind": routing.kind,
            "synthetic": routing.synthetic,
            "sampled_from_counts": routing.kind == "counts",
            "sharding": sharding(routing, num_ranks=plan.num_ranks, tokens_per_step=tokens_per_step),
            "tokens_per_step": tokens_per_step,
        },
        "provenance": ledger.provenance(),
        **declared(cluster, simulated_s=simulated, state_s=run.state_s, tokens=run.tokens),
    }
