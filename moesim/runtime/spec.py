"""Which model a deployment serves: a transformers configuration, a seed, a data type and the tilt of its routers.

Read without torch, so that a bad name or file is refused before any process starts. A configuration whose weights
would not fit a demo is scaled down in width only (hidden, heads, expert size, vocabulary): layers, experts and
experts per token stay, so that traces and plans of the demo fit the model of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import ModelError, describe
from moesim.files import read_json
from moesim.model.hf_config import LIBRARY, parse_config, resolve_name
from moesim.model.moe_model import MoEModel

FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "minimax_m2")
FULL_SIZE_LIMIT = 1 << 30
"""Bytes of weights up to which a configuration is built as it is."""
CONFIG_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that any rank can build alike."""

    name: str
    config: dict[str, Any]
    """Fields of the Hugging Face configuration."""
    seed: int = 0
    dtype: str = "float32"
    """`float32` or `bfloat16`."""
    skew: float = 0.3
    """Exponent of the expert popularity that the routers are tilted to; 0: no tilt."""
    source: str = "model"
    """Where the configuration came from, for error messages."""
    scaled: bool = False
    """True if the widths were reduced."""
    num_experts: int = 0
    moe_layer_ids: tuple[int, ...] = ()
    top_k: int = 0
    sha256: str = ""
    """Fingerprint of the model document of that name, at full width; plans carry it."""

    def content(self) -> dict[str, Any]:
        """Return the JSON object that identifies the model."""
        return {"name": self.name, "config": self.config, "seed": self.seed, "dtype": self.dtype, "skew": self.skew}


def read_spec(model: str, *, seed: int = 0, dtype: str = "float32", skew: float = 0.3, scale: str = "auto") -> ModelSpec:
    """Return the specification of `model`: a library name, a config.json, or a folder with one.

    scale: `auto` reduces the widths if the weights would exceed FULL_SIZE_LIMIT, `full` never, `tiny` always.
    Raises ModelError if the model is unknown, has no experts, or is of a family that the runtime cannot distribute.
    """
    path, name = _find(model)
    config = read_json(path, limit=CONFIG_LIMIT, error=ModelError)
    if isinstance(config, dict) and not config.get("torch_dtype") and not config.get("dtype"):
        config = {**config, "torch_dtype": dtype}
    facts = parse_config(config, name, str(path))
    if not facts.moe_layer_ids:
        raise ModelError(f"{path}: the model has no MoE layers; give a model with experts")
    if facts.experts_L is not None:
        raise ModelError(describe(str(path), "experts per layer", list(facts.experts_L), "must be equal in all layers", "the runtime serves no others"))
    if config.get("model_type") not in FAMILIES:
        rule = f"must be one of {', '.join(FAMILIES)}"
        raise ModelError(describe(str(path), "model_type", config.get("model_type"), rule, "the runtime knows the experts of these families"))
    for key, value in config.items():
        if isinstance(value, int) and not -1 <= value <= 1 << 24:
            raise ModelError(describe(str(path), key, value, "must be within -1..2^24"))
    element = 4 if dtype == "float32" else 2
    scaled = scale == "tiny" or (scale == "auto" and _weights(facts) * element > FULL_SIZE_LIMIT)
    if scaled:
        config = {**config, **_tiny_widths(config)}
    elif _weights(facts) * element > 64 * FULL_SIZE_LIMIT:
        size = f"{_weights(facts) * element} B"
        raise ModelError(describe(str(path), "weights", size, f"must be <= {64 * FULL_SIZE_LIMIT} B", "serve it scaled down"))
    return ModelSpec(
        name=name, config=config, seed=seed, dtype=dtype, skew=skew, source=str(path), scaled=scaled,
        num_experts=facts.num_experts, moe_layer_ids=facts.moe_layer_ids, top_k=facts.top_k, sha256=facts.sha256,
    )  # fmt: skip


def _find(model: str) -> tuple[Path, str]:
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or "/" in model:
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return path, name or "model"
    name = resolve_name(model)
    return LIBRARY / f"{name}.json", name


def _weights(facts: MoEModel) -> int:
    """Bound the number of weights from above: every layer counted with experts, shared experts and a dense FFN."""
    ffn = 3 * facts.hidden_size * (facts.expert_ffn_size * facts.num_experts + facts.shared_ffn_size + facts.dense_ffn_size)
    attention = 4 * facts.hidden_size * facts.attention.num_heads * facts.attention.head_dim
    return facts.num_layers * (ffn + attention + facts.num_experts * facts.hidden_size) + 2 * facts.vocab_size * facts.hidden_size


def _tiny_widths(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that make a narrow model of the same layers, experts and routing."""
    widths: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
    widths |= {"tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    widths |= {key: 32 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in config}
    widths["intermediate_size"] = 64 if "moe_intermediate_size" in config else 32
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        widths |= {"q_lora_rank": 32 if config.get("q_lora_rank") else None}
        widths |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
        del widths["head_dim"]
    return widths
