"""`moesim model list | show M`: which models the library has, and what follows from a config."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True, help="List and show models.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """List the models of the library."""
    from moesim.cli.output import emit_json, note, table
    from moesim.model import load_model
    from moesim.model.hf_config import aliases, library_names
    from moesim.model.sizes import parameters

    models = {name: load_model(name) for name in library_names()}
    if json:
        facts = [
            {
                "name": name,
                "layers": one.num_layers,
                "moe_layers": len(one.moe_layer_ids),
                "experts": one.num_experts,
                "top_k": one.top_k,
                "parameters": parameters(one).total,
            }
            for name, one in models.items()
        ]
        emit_json({"schema": "moesim.model-list/1", "models": facts, "aliases": aliases()})
        return
    rows = []
    for name, one in models.items():
        counts = parameters(one)
        depth = f"{len(one.moe_layer_ids)}/{one.num_layers}"
        rows.append((name, f"{counts.total / 1e9:.1f} B", f"{counts.active / 1e9:.1f} B", depth, one.num_experts, one.top_k, one.expert_dtype))
    table("Models", ("name", "parameters", "active", "MoE layers", "experts", "top-k", "expert dtype"), rows)
    note("A Hugging Face config.json, or a folder with one, works wherever a name does.")


@app.command()
def show(ref: Annotated[str, typer.Argument(metavar="M", help="A library name, a config.json, or a folder with one.")], json: Json = False) -> None:
    """Show a model's facts, and the bytes and FLOPs that follow."""
    from dataclasses import asdict

    from moesim.cli.output import emit_json, note, table
    from moesim.model import load_model, sizes
    from moesim.units import format_bytes

    model = load_model(ref)
    counts = sizes.parameters(model)
    weights = {
        "expert": sizes.expert_bytes(model),
        "attention_layer": sizes.attention_weight_bytes(model),
        "dense_ffn_layer": sizes.dense_ffn_bytes(model),
        "shared_ffn_layer": sizes.shared_ffn_bytes(model),
        "router_layer": sizes.router_bytes(model),
        "embedding_and_head": sizes.embedding_bytes(model),
        "kv_per_token": sizes.kv_bytes_per_token(model),
        "all_weights": sizes.total_weight_bytes(model),
    }
    flops = {
        "expert": sizes.expert_flops(model),
        "projections_layer": sizes.projection_flops(model),
        "dense_ffn_layer": sizes.dense_ffn_flops(model),
        "shared_ffn_layer": sizes.shared_ffn_flops(model),
        "router_layer": sizes.router_flops(model),
        "head": sizes.head_flops(model),
    }
    if json:
        emit_json({"schema": "moesim.model-show/1", **asdict(model), "parameters": asdict(counts), "bytes": weights, "flops_per_token": flops})
        return
    one, with_input = model.attention, counts.active_with_embedding
    note(f"{model.name}: {counts.total / 1e9:.2f} B parameters, {counts.active / 1e9:.2f} B active ({with_input / 1e9:.2f} B with the input embedding)")
    note(f"{model.num_layers} layers of width {model.hidden_size}, {len(model.moe_layer_ids)} of them with experts:")
    experts = model.num_experts if model.experts_L is None else f"{min(model.experts_L)}..{model.num_experts}"
    note(f"  {experts} experts ({model.expert_dtype}), top-{model.top_k}, {model.num_shared_experts} shared")
    note(f"  attention {one.kind}, {one.num_heads} heads, {one.num_kv_heads} KV heads; weights {model.weight_dtype}, KV {model.kv_dtype}")
    table("\nBytes", ("what", "bytes"), [(name, format_bytes(value)) for name, value in weights.items()])
    table("\nFLOPs per token", ("what", "MFLOP"), [(name, f"{value / 1e6:.2f}") for name, value in flops.items()])
    note(f"\nsha256 {model.sha256}")
