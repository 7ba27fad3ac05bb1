"""Data types of a checkpoint: what `torch_dtype` and `quantization_config` say about experts, other weights and the KV cache.

Known methods: fp8 (also per block), mxfp4, compressed-tensors, modelopt, fbgemm_fp8, gptq, awq, bitsandbytes. Scales of int4 and fp4 are not
counted; those of block FP8 and mxfp4 are. Anything else is refused, because guessing a width would falsify every memory figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import ModelError, describe
from moesim.model.config_keys import Keys

_DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float8_e4m3fn": "fp8",
}
METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Data types by what they hold."""

    dtype: str
    expert_dtype: str
    weight_dtype: str
    kv_dtype: str
    weight_block: int | None


def precision(keys: Keys) -> Precision:
    """Return the data types that a config states.

    Raises ModelError if the dtype is missing or unknown, or the quantization method is not understood.
    """
    stated = keys.text("dtype", "torch_dtype")
    if stated is None:
        raise keys.missing(("torch_dtype", "dtype"), 'the type of the activations, like "bfloat16"')
    dtype = _DTYPES.get(stated.removeprefix("torch."))
    if dtype is None:
        raise ModelError(describe(keys.place, "torch_dtype", stated, f"must be one of {', '.join(sorted(set(_DTYPES.values())))}"))
    config = keys.mapping("quantization_config")
    if config is None:
        return Precision(dtype=dtype, expert_dtype=dtype, weight_dtype=dtype, kv_dtype=dtype, weight_block=None)
    # Activations are never stored in FP8 as a whole: a checkpoint that says so means its weights.
    dtype = "bfloat16" if dtype == "fp8" else dtype
    method = config.get("quant_method")
    weight, block = _weight(config, method, keys.place)
    kept = config.get("modules_to_not_convert") or config.get("ignored_layers") or config.get("ignore") or config.get("exclude_modules") or []
    if not isinstance(kept, list) or not all(isinstance(item, str) for item in kept):
        raise ModelError(describe(keys.place, "quantization_config.ignore", kept, "must be a list of module names"))
    attention_kept = method == "mxfp4" or any(("attn" in item or "attention" in item) and "norm" not in item for item in kept)
    cache = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    eight_bit = isinstance(cache, dict) and cache.get("num_bits") == 8 or isinstance(cache, str) and cache.upper() == "FP8"
    return Precision(
        dtype=dtype,
        expert_dtype=weight,
        weight_dtype=dtype if attention_kept else weight,
        kv_dtype="fp8" if eight_bit else dtype,
        weight_block=block,
    )


def _weight(config: dict[str, Any], method: Any, place: str) -> tuple[str, int | None]:
    key = "quantization_config"
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8", _block(config.get("weight_block_size"), f"{key}.weight_block_size", place)
    if method == "mxfp4":
        return "mxfp4", None
    if method in ("gptq", "awq"):
        return _integer(config.get("bits", config.get("w_bit")), f"{key}.bits", place), None
    if method == "bitsandbytes":
        four, eight = config.get("load_in_4bit") is True, config.get("load_in_8bit") is True
        if four == eight:
            raise ModelError(describe(place, key, config, "must set exactly one of load_in_4bit and load_in_8bit"))
        return "int4" if four else "int8", None
    if method == "modelopt":
        algorithm = config.get("quant_algo")
        widths = {"FP8": "fp8", "NVFP4": "fp4", "W4A16_AWQ": "int4"}
        if algorithm not in widths:
            raise ModelError(describe(place, f"{key}.quant_algo", algorithm, f"must be one of {', '.join(widths)}"))
        return widths[algorithm], None
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        if len(weights) != 1 or not isinstance(weights[0], dict):
            raise ModelError(describe(place, f"{key}.config_groups", groups, "must hold exactly one group with `weights`"))
        bits, kind = weights[0].get("num_bits"), weights[0].get("type")
        if kind == "float" and bits in (4, 8):
            return ("fp8" if bits == 8 else "fp4"), _block(weights[0].get("block_structure"), f"{key}.block_structure", place)
        if kind == "int":
            return _integer(bits, f"{key}.num_bits", place), None
        raise ModelError(describe(place, f"{key}.config_groups", weights[0], "must have type float or int and num_bits 4 or 8"))
    raise ModelError(describe(place, f"{key}.quant_method", method, f"must be one of {', '.join(METHODS)}", "drop quantization_config to model the plain type"))


def _integer(bits: Any, key: str, place: str) -> str:
    if bits not in (4, 8):
        raise ModelError(describe(place, key, bits, "must be 4 or 8"))
    return "int4" if bits == 4 else "int8"


def _block(value: Any, key: str, place: str) -> int | None:
    if value is None:
        return None
    edges = value if isinstance(value, list) else [value]
    if len(set(map(str, edges))) != 1 or isinstance(edges[0], bool) or not isinstance(edges[0], int) or not 1 <= edges[0] <= 65536 or len(edges) > 2:
        raise ModelError(describe(place, key, value, "must be a square block of 1..65536, like [128, 128]"))
    return edges[0]
