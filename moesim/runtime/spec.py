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

FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3")
EXPERT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts")
FULL_SIZE_LIMIT = 1 << 30
"""Bytes of weights up to which a configuration is built as it is."""
CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that any rank can build alike."""

    name: str
    config: dict[str, Any]
    """Fields of the Hugging Face configuration."""
    seed: int = 0
    dtype: str = "float32"
    """`float32` or `bfloat16`."""
    skew: float = 1.0
    """Exponent of the expert popularity that the routers are tilted to; 0: no tilt."""
    source: str = "model"
    """Where the configuration came from, for error messages."""
    scaled: bool = False
    """True if the widths were reduced."""

    def content(self) -> dict[str, Any]:
        """Return the JSON object that identifies the model."""
        return {"name": self.name, "config": self.config, "seed": self.seed, "dtype": self.dtype, "skew": self.skew}


def read_spec(model: str, *, seed: int = 0, dtype: str = "float32", skew: float = 1.0, scale: str = "auto") -> ModelSpec:
    """Return the specification of `model`: a library name, a config.json, or a folder with one.

    scale: `auto` reduces the widths if the weights would exceed FULL_SIZE_LIMIT, `full` never, `tiny` always.
    Raises ModelError if the model is unknown, has no experts, or is of a family that the runtime cannot distribute.
    """
    path = _find(model)
    config = read_json(path, limit=CONFIG_LIMIT, error=ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must be a JSON object, the config.json of a Hugging Face model")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(describe(str(path), "model_type", family, f"must be one of {', '.join(FAMILIES)}", "the runtime knows the experts of these families"))
    name = path.parent.name if path.name == "config.json" else path.stem
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value <= 1 << 24:
            raise ModelError(describe(str(path), key, value, "must be within -1..2^24"))
    weights = _weight_bytes(config, str(path), 4 if dtype == "float32" else 2)
    scaled = scale == "tiny" or (scale == "auto" and weights > FULL_SIZE_LIMIT)
    if scaled:
        config = {**config, **_tiny_widths(config)}
        weights = _weight_bytes(config, str(path), 4 if dtype == "float32" else 2)
    if weights > 64 * FULL_SIZE_LIMIT:
        raise ModelError(describe(str(path), "weights", f"{weights} B", f"must be <= {64 * FULL_SIZE_LIMIT} B"))
    return ModelSpec(name=name, config=config, seed=seed, dtype=dtype, skew=skew, source=str(path), scaled=scaled)


def _find(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    if "/" not in model and not model.endswith(".json"):
        library = _library_file(model)
        if library is not None:
            return library
    raise ModelError(f"{model}: is neither a model of the library nor a config.json; `moesim model list` shows the library")


def _library_file(name: str) -> Path | None:
    folder = Path(__file__).parent / "models"
    path = folder / f"{name}.json"
    return path if path.is_file() else None


def _number(config: dict[str, Any], place: str, *keys: str, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(describe(place, key, value, "must be an integer >= 1"))
            return value
    if default is None:
        raise ModelError(f"{place}: needs the key {' or '.join(keys)}; it is not the configuration of a MoE model")
    return default


def _weight_bytes(config: dict[str, Any], place: str, element: int) -> int:
    """Bound the bytes of all weights from above: every layer counted with experts."""
    hidden = _number(config, place, "hidden_size")
    layers = _number(config, place, "num_hidden_layers")
    experts = _number(config, place, *EXPERT_KEYS)
    ffn = _number(config, place, "moe_intermediate_size", "intermediate_size")
    vocab = _number(config, place, "vocab_size")
    return element * (layers * hidden * (3 * ffn * experts + 4 * hidden + experts) + 2 * vocab * hidden)


def _tiny_widths(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that make a narrow model of the same layers, experts and routing."""
    widths: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": False}
    widths["pad_token_id"] = None
    widths["bos_token_id"] = 1
    widths["eos_token_id"] = 2
    widths |= {key: 32 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in config}
    widths["intermediate_size"] = 64 if "moe_intermediate_size" in config else 32
    if config["model_type"] == "deepseek_v3":
        widths |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
        del widths["head_dim"]
    return widths
