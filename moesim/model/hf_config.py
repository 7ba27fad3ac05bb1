"""Model documents: a library name, a Hugging Face `config.json` or its folder in, a `MoEModel` out. Never the network.

A config is understood by its keys, not by its architecture's name, so that models nobody has heard of work if the keys are there. What would make
sizes wrong (linear attention, zero-computation experts, unknown quantization) is refused. Layers are numbered from 0. The key that counts the
routed experts may hold a list: one count per MoE layer, or one per layer with 0 (or any number, if another key says so) where a layer is dense.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesim.errors import ModelError, describe
from moesim.files import canonical_json, read_json, sha256_hex
from moesim.model.config_keys import Keys
from moesim.model.moe_model import Attention, MoEModel
from moesim.model.quantization import precision

LIBRARY = Path(__file__).resolve().parent / "library"
MAX_CONFIG_BYTES = 4 * 2**20
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_routed_experts")
TOP_K = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_selected_experts")
EXPERT_FFN = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_FFN = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
NESTED = ("text_config", "llm_config", "language_config")
PARTS = ("attn_config", "ffn_config")
"""Objects into which some families put the keys of a part of every layer."""
SIGMOID = ("llama4", "deepseek_v3", "glm4_moe", "minimax_m2", "dots1")
"""How the types of models begin whose code applies a sigmoid although their config may not say so."""
GATES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus", "noaux_tc": "sigmoid"}
"""What configs call the gate's activation → what it is."""
PLAIN_ACTIVATIONS = frozenset({"relu", "relu2", "gelu_new", "gelu_fast"})
"""Activations of FFNs that have two matrices; the others come with a gate."""
_SUFFIX = re.compile(r"-(?:instruct|base|chat|hf|it|pt|v0\.1|0924|0125|2507|0324|0528|bf16|thinking)$")


def library_names() -> tuple[str, ...]:
    """Return the names of the models in the library, sorted."""
    return tuple(sorted(path.stem for path in LIBRARY.glob("*.json") if path.stem != "aliases"))


def load_model(ref: str | Path) -> MoEModel:
    """Return the model that a library name (any case, aliases too), a `config.json` or a folder with one describes.

    Raises ModelError if the name is unknown, a key is missing, or a value is out of range.
    """
    text = str(ref)
    path = Path(text)
    if isinstance(ref, Path) or text.endswith(".json") or text.startswith((".", "/", "~")) or ("/" in text and path.exists()):
        path = path.expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(f"{path}: has no config.json; give the folder of a Hugging Face checkpoint or the file itself")
            path = path / "config.json"
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return parse_config(read_json(path, limit=MAX_CONFIG_BYTES, error=ModelError), name or "model", str(path))
    name = resolve_name(text)
    return parse_config(read_json(LIBRARY / f"{name}.json", error=ModelError), name, f"library model {name}")


@lru_cache(maxsize=1)
def aliases() -> dict[str, str]:
    """Return alias → library name."""
    return dict(read_json(LIBRARY / "aliases.json", error=ModelError))


def resolve_name(text: str) -> str:
    """Return the library name that `text` (a name, an alias or a hub id like `Qwen/Qwen3-30B-A3B`) stands for."""
    lowered = text.strip().lower().rsplit("/", 1)[-1].replace("_", "-")
    names, known = library_names(), aliases()
    # One suffix at a time, so that the longest known name wins. A precision that changes sizes (…-fp8) is never dropped; it stays behind what is.
    candidate, precise = (lowered[: -len("-fp8")], "-fp8") if lowered.endswith("-fp8") else (lowered, "")
    while True:
        if candidate + precise in names:
            return candidate + precise
        if candidate + precise in known:
            return known[candidate + precise]
        shorter = _SUFFIX.sub("", candidate)
        if shorter == candidate:
            break
        candidate = shorter
    near = difflib.get_close_matches(lowered, [*names, *known], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"library: {', '.join(names)}"
    raise ModelError(f"model {text!r}: is neither in the library nor a config.json; {hint}")


def parse_config(node: Any, name: str, place: str) -> MoEModel:
    """Return the model of a parsed config; `name` becomes its name, `place` stands in errors."""
    if not isinstance(node, dict):
        raise ModelError(f"{place}: must be a JSON object, as in a Hugging Face config.json")
    inner = next((key for key in NESTED if isinstance(node.get(key), dict)), None)
    text = node[inner] if inner else node
    for part in PARTS:
        if isinstance(text.get(part), dict):
            text = {**text[part], **text}
    keys = Keys(text, node if inner else {}, place)
    layers = keys.need("num_hidden_layers", "num_layers", "n_layer", "n_layers", low=1, high=2000)
    _refuse_foreign_layers(keys, layers)
    hidden = keys.need("hidden_size", "n_embd", "d_model", low=1, high=1_000_000)
    experts, moe_layers, counts = _counts(keys, layers)
    _agree(keys, EXPERTS)
    family = keys.text("model_type", default="") or ""
    types = precision(keys)
    facts: dict[str, Any] = {
        "num_experts": experts,
        "moe_layer_ids": moe_layers,
        "experts_L": counts,
        "top_k": 0,
        "expert_ffn_size": 0,
        "num_shared_experts": 0,
        "shared_ffn_size": 0,
        "num_groups": 1,
        "top_k_groups": 1,
        "gate_activation": "softmax",
    }
    if experts:
        facts.update(_experts(keys, counts or (experts,), family, layers))
    dense = 0
    if len(moe_layers) < layers:
        dense = keys.need(*(("intermediate_size_mlp",) if family.startswith("llama4") else ("intermediate_size", "ffn_hidden_size")), low=1, high=10_000_000)
    activation = keys.text("mlp_hidden_act", "hidden_act", "hidden_activation", default="silu")
    architectures = keys.get("architectures")[1]
    architecture = architectures[0] if isinstance(architectures, list) and architectures and isinstance(architectures[0], str) else ""
    model = MoEModel(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=keys.need("vocab_size", "padded_vocab_size", low=1, high=100_000_000),
        attention=_attention(keys, layers, hidden),
        dense_ffn_size=dense,
        dtype=types.dtype,
        expert_dtype=types.expert_dtype,
        weight_dtype=types.weight_dtype,
        kv_dtype=types.kv_dtype,
        weight_block=types.weight_block,
        gated_ffn=activation not in PLAIN_ACTIVATIONS,
        tie_embeddings=keys.flag("tie_word_embeddings", default=family.startswith("gemma")),
        max_position=keys.need("max_position_embeddings", "seq_length", "max_sequence_length", "max_seq_len", "n_positions", low=1, high=10**9),
        architecture=architecture[:200],
        source=place,
        **facts,
    )
    identity = {key: value for key, value in asdict(model).items() if key not in ("name", "source", "sha256", "architecture")}
    if model.experts_L is None:
        del identity["experts_L"]  # equal layers keep the fingerprint that they had before layers could differ
    return MoEModel(**{**{key: getattr(model, key) for key in MoEModel.__dataclass_fields__}, "sha256": sha256_hex(canonical_json(identity))})


def _agree(keys: Keys, names: tuple[str, ...]) -> None:
    stated = {name: keys.node[name] for name in names if keys.node.get(name) is not None}
    if len({str(value) for value in stated.values()}) > 1:
        raise ModelError(describe(keys.place, " and ".join(stated), list(stated.values()), "must agree: all of them count the routed experts"))


def _counts(keys: Keys, layers: int) -> tuple[int, tuple[int, ...], tuple[int, ...] | None]:
    """Return E, the layers with experts, and the experts of each of them where the config lists them."""
    name, value = keys.get(*EXPERTS)
    if not isinstance(value, list):
        experts = keys.whole(*EXPERTS, low=0, high=65_536, required=False) or 0
        moe_layers = _moe_layers(keys, layers) if experts else ()
        return (experts if moe_layers else 0), moe_layers, None
    listed = keys.whole_list(name, low=0, high=65_536) or []
    moe_layers = _moe_layers(keys, layers)
    if len(listed) == layers:
        moe_layers = tuple(layer for layer in moe_layers if listed[layer])
        listed = [listed[layer] for layer in moe_layers]
    elif len(listed) != len(moe_layers) or 0 in listed:
        rule = f"must list the experts of the {len(moe_layers)} MoE layers (each >= 1), or of all {layers} layers (0: dense)"
        raise ModelError(describe(keys.place, name, value, rule))
    return max(listed, default=0), moe_layers, tuple(listed) if moe_layers else None


def _moe_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    """Return the layers with experts. Rules of different families are conditions that must all hold."""
    ids = set(range(layers))
    freq = keys.get("moe_layer_freq")[1]
    if isinstance(freq, list):
        flags = keys.whole_list("moe_layer_freq", low=0, high=1) or []
        if len(flags) != layers:
            raise ModelError(describe(keys.place, "moe_layer_freq", f"{len(flags)} entries", f"must have one per layer ({layers})"))
        ids &= {layer for layer, flag in enumerate(flags) if flag}
    else:
        every = keys.need("moe_layer_freq", low=1, high=layers, default=1)
        ids &= set(range(0, layers, every))
    ids -= set(range(keys.need("first_k_dense_replace", "moe_layer_num_skipped", low=0, high=layers, default=0)))
    step = keys.need("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", low=1, high=layers, default=1)
    ids &= {layer for layer in range(layers) if (layer + 1) % step == 0}
    ids -= set(keys.whole_list("mlp_only_layers", low=0, high=layers - 1) or [])
    listed = keys.whole_list("moe_layers", low=0, high=layers - 1)
    if listed is not None:
        ids &= set(listed)
    kinds = keys.text_list("mlp_layer_types", length=layers)
    if kinds is not None:
        ids &= {layer for layer, kind in enumerate(kinds) if kind in ("sparse", "moe")}
    last = keys.need("moe_layer_end_index", low=-1, high=layers, default=-1)
    ids &= set(range(keys.need("moe_layer_start_index", low=0, high=layers, default=0), layers if last == -1 else last + 1))
    return tuple(sorted(ids))


def _experts(keys: Keys, counts: tuple[int, ...], family: str, layers: int) -> dict[str, Any]:
    experts = min(counts)  # what holds in the smallest layer holds in all
    top_k = keys.need(*TOP_K, low=1, high=experts, layers=layers)
    # Without a size of their own, experts have the only FFN size there is (Mixtral, gpt-oss, OLMoE).
    ffn = keys.need(*EXPERT_FFN, "intermediate_size", "ffn_hidden_size", low=1, high=10_000_000, layers=layers)
    shared_ffn = keys.whole(*SHARED_FFN, low=0, high=10_000_000, required=False)
    shared = keys.whole(*SHARED, low=0, high=1024, required=False, layers=layers)
    if family.startswith("llama4") and shared is None:
        shared = 1
    if keys.flag("residual_moe", default=False):
        # A dense FFN beside the experts is what a shared expert is.
        shared, shared_ffn = 1, keys.need("intermediate_size", low=1, high=10_000_000)
    if shared is None:
        shared = 1 if shared_ffn else 0
    if shared == 0 or shared_ffn == 0:
        shared, shared_ffn = 0, 0
    elif shared_ffn is None:
        shared_ffn = shared * ffn
    groups = keys.need("n_group", "num_expert_groups", low=1, high=experts, default=1)
    if keys.text("topk_method") == "greedy":
        groups = 1
    chosen = groups if groups == 1 else keys.need("topk_group", "num_limited_groups", low=1, high=groups, default=groups)
    if any(count % groups for count in counts):
        raise ModelError(describe(keys.place, "n_group", groups, f"must divide the number of experts ({', '.join(map(str, sorted(set(counts))))})"))
    if top_k > chosen * (experts // groups):
        raise ModelError(describe(keys.place, "topk_group", chosen, f"must leave at least {top_k} experts to choose from (groups of {experts // groups})"))
    gate = keys.text("scoring_func", "moe_router_activation_func", "score_func", default="sigmoid" if family.startswith(SIGMOID) else "softmax")
    if gate not in GATES:
        raise ModelError(describe(keys.place, "scoring_func", gate, f"must be one of {', '.join(GATES)}"))
    return {
        "top_k": top_k,
        "expert_ffn_size": ffn,
        "num_shared_experts": shared,
        "shared_ffn_size": shared_ffn,
        "num_groups": groups,
        "top_k_groups": chosen,
        "gate_activation": GATES[str(gate)],
    }


def _attention(keys: Keys, layers: int, hidden: int) -> Attention:
    heads = keys.need("num_attention_heads", "n_head", "n_heads", low=1, high=65_536)
    latent = keys.whole("kv_lora_rank", low=1, high=1_000_000, required=False)
    if latent is not None:
        nope = keys.need("qk_nope_head_dim", low=1, high=65_536)
        return Attention(
            kind="mla",
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=nope + keys.need("qk_rope_head_dim", low=1, high=65_536),
            q_lora_rank=keys.whole("q_lora_rank", low=1, high=1_000_000, required=False),
            kv_lora_rank=latent,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=keys.need("qk_rope_head_dim", low=1, high=65_536),
            v_head_dim=keys.need("v_head_dim", low=1, high=65_536),
        )
    for key in ("q_lora_rank", "o_lora_rank"):
        if keys.get(key)[1]:
            raise ModelError(describe(keys.place, key, keys.get(key)[1], "needs kv_lora_rank: the sizes of low-rank attention other than MLA are unknown"))
    kv_heads = keys.need("num_key_value_heads", "num_kv_heads", "kv_n_heads", low=1, high=65_536, default=heads)
    if heads % kv_heads:
        raise ModelError(describe(keys.place, "num_key_value_heads", kv_heads, f"must divide num_attention_heads ({heads})"))
    dim = keys.whole("head_dim", low=1, high=65_536, required=False)
    if dim is None:
        if hidden % heads:
            raise ModelError(describe(keys.place, "num_attention_heads", heads, f"must divide hidden_size ({hidden})", "or give head_dim"))
        dim = hidden // heads
    window, sliding = _sliding(keys, layers)
    return Attention(
        kind="mha" if kv_heads == heads else "gqa",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        sliding_window=window,
        sliding_every=max(1, round(layers / len(sliding))) if sliding else None,
        sliding_layer_ids=sliding,
    )


def _sliding(keys: Keys, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window and the layers that have it."""
    window = keys.whole("sliding_window", low=1, high=10**9, required=False) if keys.flag("use_sliding_window", default=True) else None
    kinds = keys.text_list("layer_types", length=layers)
    if kinds is not None:
        sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
        if sliding and window is None:
            raise keys.missing(("sliding_window",), "layer_types has sliding_attention")
    elif window is not None:
        pattern = keys.whole("sliding_window_pattern", low=1, high=layers, required=False)
        first = keys.need("max_window_layers", low=0, high=10_000, default=0)
        sliding = tuple(layer for layer in range(layers) if layer >= first and (pattern is None or (layer + 1) % pattern))
    else:
        sliding = ()
    # A window that no sequence outgrows is none.
    context = keys.whole("max_position_embeddings", low=1, high=10**9, required=False)
    narrow = window is not None and (context is None or window < context)
    return (window, sliding) if sliding and narrow else (None, ())


def _refuse_foreign_layers(keys: Keys, layers: int) -> None:
    """Refuse layers whose sizes do not follow from the keys that are read here."""
    foreign = (
        "hybrid_override_pattern",
        "hybrid_layer_pattern",
        "linear_attn_config",
        "full_attention_interval",
        "layers_block_type",
        "zero_expert_num",
        "mamba_d_state",
        "use_cla",
        "parallel_attn_mlp_res",
    )
    for key in foreign:
        value = keys.get(key)[1]
        if value:
            raise ModelError(describe(keys.place, key, value, "is not understood: layers of this kind have sizes that moesim does not know"))
    for kind in keys.text_list("layer_types", length=layers) or ():
        if kind not in ("sliding_attention", "full_attention", "attention"):
            raise ModelError(describe(keys.place, "layer_types", kind, "must be sliding_attention or full_attention: sizes of others are not known"))
    if 0 in (keys.whole_list("attn_type_list", low=0, high=10) or ()):
        raise ModelError(describe(keys.place, "attn_type_list", 0, "must be 1 in every layer: the sizes of linear attention are not known"))
