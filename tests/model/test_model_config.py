"""Hugging Face configs: which layers have experts, what precision the weights have, what is refused and how."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import ModelError
from moesim.model import library_names, load_model
from moesim.model.hf_config import LIBRARY, aliases, parse_config

BASE: dict[str, Any] = {
    "architectures": ["SomethingNewForCausalLM"],
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def parse(**changes: Any) -> Any:
    """Parse the base config with keys changed; the value `...` removes a key."""
    node = {key: value for key, value in {**copy.deepcopy(BASE), **changes}.items() if value is not ...}
    return parse_config(node, "toy", "toy/config.json")


def refusal(**changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    text = str(caught.value)
    assert text.startswith("toy/config.json: ") and "\n" not in text
    return text


def test_an_unknown_architecture_is_accepted_by_its_keys() -> None:
    model = parse()
    assert model.moe_layer_ids == tuple(range(8)) and (model.num_experts, model.top_k, model.expert_ffn_size) == (16, 4, 32)
    assert (model.attention.kind, model.attention.head_dim, model.dense_ffn_size, model.num_groups, model.gate_activation) == ("gqa", 8, 0, 1, "softmax")
    assert model.architecture == "SomethingNewForCausalLM" and model.dtype == model.expert_dtype == model.kv_dtype == "bfloat16" and not model.tie_embeddings


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"])
def test_experts_are_counted_under_any_familys_key(key: str) -> None:
    assert parse(**{"num_experts": ..., key: 32}).num_experts == 32


@pytest.mark.parametrize("key", ["num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k"])
def test_top_k_is_read_under_any_familys_key(key: str) -> None:
    assert parse(**{"num_experts_per_tok": ..., key: 3}).top_k == 3


def test_a_list_of_one_value_for_all_layers_is_that_value() -> None:
    assert parse(moe_topk=[4] * 8, num_experts_per_tok=..., num_shared_expert=[1] * 8, moe_intermediate_size=[32] * 8) == parse(n_shared_experts=1)


def test_keys_of_a_part_may_be_an_object_of_their_own() -> None:
    removed = dict.fromkeys(("num_experts", "num_experts_per_tok", "num_key_value_heads", "num_attention_heads", "num_hidden_layers", "intermediate_size"), ...)
    parts = {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 16, "moe_top_k": 4, "model_type": ""}, "attn_config": {"kv_n_heads": 2}}
    assert parse(**removed, **parts, n_heads=8, n_layers=8, moe_intermediate_size=...) == parse()


def test_keys_that_count_the_same_thing_must_agree() -> None:
    assert parse(num_local_experts=16).num_experts == 16
    assert "must agree" in refusal(num_local_experts=8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"first_k_dense_replace": 3}, (3, 4, 5, 6, 7)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4, 6)),
        ({"decoder_sparse_step": 2}, (1, 3, 5, 7)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 7]}, (1, 2, 3, 4, 5, 6)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1, 0, 1]}, (1, 2, 4, 5, 7)),
        ({"interleave_moe_layer_step": 4}, (3, 7)),
        ({"mlp_layer_types": ["dense", "sparse"] * 4}, (1, 3, 5, 7)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 6, "moe_layer_interval": 1}, (1, 2, 3, 4, 5, 6)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": -1}, (2, 3, 4, 5, 6, 7)),
        ({"moe_layers": [5, 6]}, (5, 6)),
        ({"first_k_dense_replace": None, "mlp_only_layers": []}, tuple(range(8))),
    ],
)
def test_layers_with_experts_follow_the_familys_rule(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    model = parse(**changes)
    assert model.moe_layer_ids == expected and model.dense_ffn_size == (256 if len(expected) < 8 else 0)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_dense_first_layers_and_frequency_agree_with_the_loop(layers: int, first: int, freq: int) -> None:
    first, freq = min(first, layers), min(freq, layers)
    expected = tuple(layer for layer in range(layers) if layer >= first and layer % freq == 0)
    assert parse(num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=freq).moe_layer_ids == expected


def test_a_model_whose_rule_leaves_no_expert_layer_is_dense() -> None:
    model = parse(first_k_dense_replace=8)
    assert model.moe_layer_ids == () and model.num_experts == 0 and model.top_k == 0 and model.dense_ffn_size == 256


@pytest.mark.parametrize(
    ("changes", "shared", "size"),
    [
        ({"n_shared_experts": 2}, 2, 64),
        ({"n_shared_experts": 0}, 0, 0),
        ({"n_shared_experts": None}, 0, 0),
        ({"shared_expert_intermediate_size": 96}, 1, 96),
        ({"shared_expert_intermediate_size": 0}, 0, 0),
        ({"n_shared_experts": 2, "shared_expert_intermediate_size": 80}, 2, 80),
        ({"model_type": "llama4_text", "intermediate_size_mlp": 512}, 1, 32),
        ({"residual_moe": True}, 1, 256),
    ],
)
def test_shared_experts(changes: dict[str, Any], shared: int, size: int) -> None:
    model = parse(**changes)
    assert (model.num_shared_experts, model.shared_ffn_size) == (shared, size)


def test_groups() -> None:
    model = parse(n_group=4, topk_group=2, scoring_func="sigmoid")
    assert (model.num_groups, model.top_k_groups, model.gate_activation) == (4, 2, "sigmoid")
    assert parse(n_group=4, topk_group=2, topk_method="greedy").num_groups == 1
    assert "must divide" in refusal(n_group=5, topk_group=1)
    assert "topk_group = 5" in refusal(n_group=4, topk_group=5)
    assert "at least 8 experts" in refusal(n_group=8, topk_group=2, num_experts_per_tok=8)


def test_mla_needs_all_its_sizes() -> None:
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": None}
    one = parse(**sizes).attention
    assert (one.kind, one.head_dim, one.kv_lora_rank, one.q_lora_rank) == ("mla", 24, 32, None)
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert f"{key}: is missing" in refusal(**{**sizes, key: ...})


def test_sliding_windows() -> None:
    alternate = ["sliding_attention", "full_attention"] * 4
    one = parse(sliding_window=128, layer_types=alternate).attention
    assert (one.sliding_window, one.sliding_every, one.sliding_layer_ids) == (128, 2, (0, 2, 4, 6))
    assert parse(sliding_window=128, use_sliding_window=False).attention.sliding_window is None
    assert parse(sliding_window=128).attention.sliding_layer_ids == tuple(range(8))
    assert parse(sliding_window=128, sliding_window_pattern=4).attention.sliding_layer_ids == (0, 1, 2, 4, 5, 6)
    assert parse(sliding_window=128, max_window_layers=6).attention.sliding_layer_ids == (6, 7)
    assert parse(sliding_window=128, layer_types=["full_attention"] * 8).attention.sliding_window is None
    assert parse(sliding_window=4096).attention == parse().attention, "no sequence outgrows a window as long as the context"
    assert "must have one per layer (8)" in refusal(sliding_window=128, layer_types=alternate[:-1])
    assert "sliding_window: is missing" in refusal(layer_types=alternate)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}, "ignore": ["lm_head", "re:.*self_attn.*"]}


@pytest.mark.parametrize(
    ("quantization", "expert", "weight", "block"),
    [
        (None, "bfloat16", "bfloat16", None),
        (FP8, "fp8", "fp8", 128),
        ({**FP8, "weight_block_size": None}, "fp8", "fp8", None),
        ({**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.post_attention_layernorm"]}, "fp8", "fp8", 128),
        ({**FP8, "modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}, "fp8", "bfloat16", 128),
        ({"quant_method": "mxfp4"}, "mxfp4", "bfloat16", None),
        ({"quant_method": "gptq", "bits": 4}, "int4", "int4", None),
        ({"quant_method": "awq", "bits": 8}, "int8", "int8", None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", "int8", None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4", "fp4", None),
        (compressed(num_bits=4, type="int"), "int4", "bfloat16", None),
        (compressed(num_bits=8, type="float"), "fp8", "bfloat16", None),
    ],
)
def test_quantization_gives_the_width_of_experts_and_other_weights(quantization: Any, expert: str, weight: str, block: int | None) -> None:
    model = parse(quantization_config=quantization)
    assert (model.expert_dtype, model.weight_dtype, model.weight_block, model.dtype, model.kv_dtype) == (expert, weight, block, "bfloat16", "bfloat16")


def test_an_eight_bit_kv_cache_is_seen() -> None:
    assert parse(quantization_config={**FP8, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}).kv_dtype == "fp8"
    assert parse(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}).kv_dtype == "fp8"


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "hqq"}, "quantization_config.quant_method = 'hqq' must be one of fp8"),
        ({}, "quantization_config.quant_method = None"),
        ("fp8", "must be a JSON object"),
        ({**FP8, "weight_block_size": [128, 64]}, "square block"),
        ({**FP8, "weight_block_size": [0, 0]}, "square block"),
        ({**FP8, "weight_block_size": "128"}, "square block"),
        ({**FP8, "modules_to_not_convert": "lm_head"}, "list of module names"),
        ({"quant_method": "gptq", "bits": 3}, "must be 4 or 8"),
        ({"quant_method": "gptq"}, "must be 4 or 8"),
        ({"quant_method": "bitsandbytes"}, "exactly one"),
        ({"quant_method": "modelopt", "quant_algo": "W1"}, "quant_algo"),
        ({"quant_method": "compressed-tensors"}, "exactly one group"),
        (compressed(num_bits=6, type="float"), "num_bits 4 or 8"),
    ],
)
def test_unknown_quantization_is_refused_with_the_rule(quantization: Any, words: str) -> None:
    assert words in refusal(quantization_config=quantization)


def test_nested_text_configs_are_read_with_the_outer_level_as_fallback() -> None:
    inner = {key: value for key, value in BASE.items() if key not in ("torch_dtype", "architectures")}
    outer = {"architectures": ["SomeVisionModel"], "text_config": inner, "dtype": "bfloat16", "quantization_config": FP8, "vision_config": {"hidden_size": 5}}
    model = parse_config(outer, "toy", "toy/config.json")
    assert model.hidden_size == 64 and model.expert_dtype == "fp8" and model.architecture == "SomeVisionModel"
    assert parse_config({**outer, "quantization_config": None}, "toy", "p").sha256 == parse().sha256


REQUIRED = ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings", "torch_dtype", "num_experts_per_tok"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    text = refusal(**{key: ...})
    assert "is missing" in text and key in text


def test_a_misspelt_key_gets_a_near_match() -> None:
    assert "did you mean 'hidden_size' where it says 'hiden_size'?" in refusal(hidden_size=..., hiden_size=64)


@pytest.mark.parametrize("key", [key for key, value in BASE.items() if isinstance(value, int)])
@pytest.mark.parametrize("value", [-1, 0, 10**12, 1.5, 64.0, "64", True, [64], {}])
def test_absurd_sizes_are_refused(key: str, value: Any) -> None:
    if key == "num_experts" and value == 0 and not isinstance(value, bool):
        assert parse(num_experts=0).num_experts == 0
    elif key == "intermediate_size":
        assert "intermediate_size" in refusal(intermediate_size=value, first_k_dense_replace=1)
    else:
        assert f"{key} = " in refusal(**{key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "must divide num_attention_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "must divide hidden_size"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 must be in 1..16"),
        ({"torch_dtype": "int3"}, "torch_dtype = 'int3'"),
        ({"scoring_func": "argmax"}, "scoring_func = 'argmax'"),
        ({"moe_layer_freq": [1] * 7}, "one per layer (8)"),
        ({"moe_layer_freq": [2] * 8}, "0..1"),
        ({"mlp_only_layers": [8]}, "0..7"),
        ({"mlp_only_layers": "0"}, "list of whole numbers"),
        ({"first_k_dense_replace": 9}, "0..8"),
        ({"layer_types": ["linear_attention"] * 8}, "layer_types = 'linear_attention'"),
        ({"zero_expert_num": 2}, "zero_expert_num"),
        ({"q_lora_rank": 16}, "q_lora_rank = 16 needs kv_lora_rank"),
        ({"hybrid_layer_pattern": [0, 1]}, "is not understood"),
        ({"attn_type_list": [1, 0]}, "attn_type_list"),
        ({"tie_word_embeddings": "no"}, "true or false"),
        ({"model_type": 5}, "short text"),
        ({"use_cla": True}, "use_cla"),
        ({"moe_topk": [4, 4, 2, 4, 4, 4, 4, 4], "num_experts_per_tok": ...}, "must be a whole number"),
    ],
)
def test_contradictions_and_foreign_layers_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


# --- files and names ---


def test_a_file_and_its_folder_give_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    by_folder, by_file, by_text = load_model(folder), load_model(folder / "config.json"), load_model(f"{folder}/config.json")
    assert by_folder == by_file == by_text and by_folder.name == "my-model" and by_folder.sha256 == parse().sha256


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'"x"', "JSON object"),
        (b'{"hidden_size": NaN}', "NaN is not allowed"),
        (b'{"hidden_size": Infinity}', "Infinity is not allowed"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested deeper"),
        (b"\xff\xfe{}", ""),
        (b'{"hidden_size": 1e400}', ""),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(5 * 2**20)
    with pytest.raises(ModelError, match="size"):
        load_model(path)


KEYS = st.sampled_from([*BASE, "layer_types", "quantization_config", "n_group", "kv_lora_rank", "moe_layer_freq"])
SCALARS: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES: st.SearchStrategy[Any] = SCALARS | st.lists(st.integers(), max_size=4) | st.just({})


@given(st.dictionaries(KEYS, VALUES, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_config_parses_or_is_refused(changes: dict[str, Any]) -> None:
    try:
        model = parse(**changes)
    except ModelError as error:
        assert str(error).startswith("toy/config.json")
    else:
        assert model.num_layers >= 1 and all(0 <= layer < model.num_layers for layer in model.moe_layer_ids)


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b-fp8"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("allenai/OLMoE-1B-7B-0924", "olmoe-1b-7b"),
        ("olmoe", "olmoe-1b-7b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("FLAME-MoE-290M", "flame-moe-290m"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"),
        ("MiniMaxAI/MiniMax-M2.5", "minimax-m2.5"),
        ("qwen3_30b_a3b", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "qwen3-30b-a3b-fp8"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8", "qwen3-30b-a3b-fp8"),
        ("baidu/ERNIE-4.5-21B-A3B-PT", "ernie-4.5-21b-a3b"),
        ("databricks/dbrx-instruct", "dbrx"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout-17b-16e"),
    ],
)
def test_names_aliases_and_hub_ids_find_their_model(ref: str, name: str) -> None:
    assert load_model(ref).name == name


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("deepseek-v33", "did you mean 'deepseek-v3'"),
        ("qwen3-30b-a3", "qwen3-30b-a3b"),
        ("", "library: "),
        ("%%%", "library: "),
        ("mixtral-8x7b-fp8", "did you mean"),
        ("./nowhere", "does not exist"),
        ("a/b/config.json", "does not exist"),
    ],
)
def test_an_unknown_name_is_explained(ref: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(ref)
    assert words in str(caught.value)


def test_aliases_point_into_the_library_and_shadow_nothing() -> None:
    assert set(aliases().values()) <= set(library_names()) and not set(aliases()) & set(library_names())


@pytest.mark.parametrize("name", library_names())
def test_every_library_model_loads_alike_from_its_file(name: str) -> None:
    from_name, from_file = load_model(name), load_model(LIBRARY / f"{name}.json")
    assert from_name.sha256 == from_file.sha256 and from_name.name == name == from_file.name


def test_identity_is_that_of_the_architecture() -> None:
    prints = {name: load_model(name).sha256 for name in library_names()}
    assert len(set(prints.values())) == len(prints)
    node = json.loads((LIBRARY / "mixtral-8x7b.json").read_text())
    renamed = parse_config(dict(reversed(list(node.items()))), "other", "elsewhere")
    assert renamed.sha256 == prints["mixtral-8x7b"]
    assert parse_config({**node, "num_experts_per_tok": 3}, "other", "elsewhere").sha256 != prints["mixtral-8x7b"]


def test_known_facts_of_the_library() -> None:
    deepseek, flame, gpt = load_model("deepseek-v3"), load_model("flame-moe-290m"), load_model("gpt-oss-120b")
    assert deepseek.moe_layer_ids == tuple(range(3, 61)) and (deepseek.num_groups, deepseek.top_k_groups, deepseek.gate_activation) == (8, 4, "sigmoid")
    assert (deepseek.attention.kind, deepseek.attention.q_lora_rank, deepseek.weight_block, deepseek.expert_dtype) == ("mla", 1536, 128, "fp8")
    assert flame.moe_layer_ids == tuple(range(1, 9)) and (flame.num_layers, flame.num_experts, flame.top_k, flame.num_shared_experts) == (9, 64, 6, 2)
    assert (gpt.expert_dtype, gpt.weight_dtype, gpt.attention.sliding_window, gpt.attention.sliding_every) == ("mxfp4", "bfloat16", 128, 2)
    assert load_model("deepseek-v2-lite").moe_layer_ids == tuple(range(1, 27)) and load_model("llama-3.1-8b").moe_layer_ids == ()
