"""Recording a Hugging Face model: what a trace holds is what the routers chose, whatever the family, the phase or the end of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim import api  # noqa: E402
from moesim.errors import InputError, ModelError, TraceError  # noqa: E402
from moesim.runtime.capture import Capture, overhead  # noqa: E402
from moesim.runtime.capture_join import join  # noqa: E402
from moesim.runtime.capture_ranks import run  # noqa: E402
from moesim.runtime.capture_run import Job  # noqa: E402
from moesim.runtime.model import build, moe_layers, router_of  # noqa: E402
from moesim.runtime.spec import read_spec  # noqa: E402
from moesim.traces.manifest import STAGES  # noqa: E402
from moesim.traces.open import open_trace  # noqa: E402
from moesim.traces.routing_trace import TokenBatch, concatenate  # noqa: E402
from tests.runtime.live import moesim  # noqa: E402

COMMON = {
    "torch_dtype": "float32", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128,
    "max_position_embeddings": 512, "num_experts_per_tok": 2, "intermediate_size": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "deepseek_v2": {
        "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "topk_method": "group_limited_greedy",
    },
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}  # fmt: skip
TEXT = "It is a truth universally acknowledged that a token in possession of a router must be in want of an expert. " * 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(folder: Path, family: str = "qwen3_moe") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, "model_type": family, **FAMILIES[family]}))
    return folder


def model_of(folder: Path, family: str = "qwen3_moe") -> Any:
    model = build(read_spec(str(config(folder, family))))
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    return model


def rows_of(trace: Path) -> TokenBatch:
    return concatenate(list(open_trace(str(trace)).batches()))


def chosen(model: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Return ids and weights [N, L, k] straight from the routers' own outputs, and the hidden state that every experts module got."""
    outputs: list[Any] = []
    hidden: list[Any] = []
    blocks = list(moe_layers(model).values())
    experts = int(router_of(blocks[0], model_experts(model)).weight.shape[0])
    handles = [router_of(block, experts).register_forward_hook(lambda _, args, output: outputs.append(output)) for block in blocks]
    handles += [block.experts.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for block in blocks]
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([out[2].numpy() for out in outputs], 1), np.stack([out[1].numpy() for out in outputs], 1), hidden


def model_experts(model: Any) -> int:
    return int(next(iter(moe_layers(model).values())).experts.gate_up_proj.shape[0])


@pytest.mark.filterwarnings("ignore:.*RoPE.*")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_holds_what_the_routers_chose(tmp_path: Path, family: str) -> None:
    model = model_of(tmp_path / "m", family)
    if family == "deepseek_v3":  # a bias makes its router choose in another order than it weighs
        for block in moe_layers(model).values():
            router_of(block, 8).e_score_correction_bias.copy_(torch.linspace(0, 1, 8))
    tokens = torch.arange(14).view(2, 7)
    ids_NLk, weights_NLk, hidden = chosen(model, tokens)
    with Capture(model, tmp_path / "t", weights=True, predictions=True), torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    rows = rows_of(tmp_path / "t")
    assert rows.weights_TLK is not None and rows.predicted_TLK is not None
    if family.startswith("deepseek"):  # its router chooses without an order; a trace is best first
        order = np.argsort(-weights_NLk, axis=-1, kind="stable")
        ids_NLk, weights_NLk = (np.take_along_axis(cube, order, -1) for cube in (ids_NLk, weights_NLk))
    assert (rows.experts_TLK == ids_NLk).all() and (rows.weights_TLK == weights_NLk).all()
    assert rows.position_T.tolist() == [*range(7), *range(7)] and len(set(rows.request_T.tolist())) == 2 and set(rows.phase_T.tolist()) == {0}
    blocks = list(moe_layers(model).values())
    for row in range(1, len(blocks)):
        with torch.inference_mode():
            wanted = router_of(blocks[row], model_experts(model))(hidden[row - 1])[2]
        assert (np.sort(rows.predicted_TLK[:, row]) == np.sort(wanted.numpy())).all()
    if family.startswith("deepseek"):
        assert open_trace(str(tmp_path / "t")).shape.num_groups == 4


def test_generating_is_one_prefill_and_a_decode_pass_per_token(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    with Capture(model, tmp_path / "t"), torch.inference_mode():
        for _ in range(2):
            model.generate(torch.arange(10).view(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.int64), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    rows = rows_of(tmp_path / "t")
    one = [*([0] * 10), *([1] * 6)]
    assert rows.phase_T.tolist() == one * 2
    assert rows.position_T.tolist() == [*range(5), *range(5), 5, 5, 6, 6, 7, 7] * 2
    assert len(set(rows.request_T.tolist())) == 4, "a second call serves new requests"
    assert rows.request_T[:5].tolist() == [rows.request_T[10].item()] * 5
    steps = open_trace(str(tmp_path / "t")).tables("steps")  # type: ignore[misc]
    assert steps is not None and steps["n_prefill"].tolist() == [10, 0, 0, 0] * 2 and (steps["t_end_ns"] > steps["t_start_ns"]).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_records_predictions_and_positions_whatever_the_cache(tmp_path: Path, cache: str) -> None:
    model = model_of(tmp_path / "m")
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "disable_compile": True}
    with Capture(model, tmp_path / "t", predictions=True, weights="float16"), torch.inference_mode():
        model.generate(torch.arange(10).view(2, 5), attention_mask=mask, cache_implementation=cache, **options)
    rows = rows_of(tmp_path / "t")
    assert rows.position_T.tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7]
    assert rows.phase_T.tolist() == [3, *[0] * 9, *[1] * 6] and rows.weights_TLK is not None and rows.weights_TLK.dtype == np.float16
    assert rows.predicted_TLK is not None and rows.predicted_TLK.shape == rows.experts_TLK.shape
    hits = (rows.predicted_TLK[:, 1:, :, None] == rows.experts_TLK[:, 1:, None, :]).any(-1)
    assert hits[rows.phase_T == 1].mean() > 0.5, "in decoding, too, a prediction is of the same token"


def test_padding_is_marked_as_dummies(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with Capture(model, tmp_path / "t"), torch.inference_mode():
        model(input_ids=torch.arange(8).view(2, 4), attention_mask=mask)
    rows = rows_of(tmp_path / "t")
    assert rows.phase_T.tolist() == [3, 3, 0, 0, 0, 0, 0, 0] and rows.position_T.tolist()[2:] == [0, 1, 0, 1, 2, 3]


def test_training_steps_are_recorded_once_each_and_recomputation_is_not(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m").train()
    model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = torch.arange(6)[None]
    with Capture(model, tmp_path / "t") as capture:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert rows_of(tmp_path / "t").phase_T.tolist() == [2] * 12 and capture.steps == 2 and capture.incomplete == 0


def test_recording_changes_no_bit_and_leaves_no_hook(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    tokens = torch.arange(12)[None]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
        with Capture(model, tmp_path / "t", weights=True, predictions=True):
            assert torch.equal(model(input_ids=tokens).logits, before)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_stage_times_of_a_whole_model_drive_a_replay_that_takes_the_time_it_took(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m", "deepseek_v3")
    with Capture(model, tmp_path / "t"), torch.inference_mode():
        for _ in range(3):
            model(input_ids=torch.arange(16)[None], use_cache=False)
    kernels = open_trace(str(tmp_path / "t")).tables("kernels")  # type: ignore[misc]
    assert kernels is not None
    assert {STAGES[code] for code in kernels["stage"].tolist()} == {"attention", "router", "experts", "combine", "shared", "dense", "other"}
    assert set(kernels["tokens"][kernels["stage"] == STAGES.index("experts")].tolist()) == {16 * 2}
    replay = api.replay(str(tmp_path / "t"), model=str(tmp_path / "m"), hardware="laptop-1", times="trace")
    assert replay.report["step_ms"]["mean"] == pytest.approx(replay.report["times"]["recorded_step_ms"]["mean"], rel=1e-6)
    assert replay.ledger.load_LR.sum() == 3 * 16 * 2 * 2


def test_a_failing_run_leaves_what_was_routed_until_then(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")

    def interrupted() -> None:
        with Capture(model, tmp_path / "t"), torch.inference_mode():
            model(input_ids=torch.arange(6)[None])
            raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="own error"):
        interrupted()
    trace = open_trace(str(tmp_path / "t"))
    assert trace.num_rows == 6 and trace.provenance["unfinished"] is True


def test_a_killed_run_is_readable_up_to_its_last_checkpoint(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    capture = Capture(model, tmp_path / "t", checkpoint_s=0.0)
    with torch.inference_mode():
        capture.__enter__()
        for _ in range(3):
            model(input_ids=torch.arange(6)[None])
    for handle in capture._handles:  # from here on it is as if the process had been killed: nothing is closed
        handle.remove()
    trace = open_trace(str(tmp_path / "t"))
    assert trace.num_rows == 18 and trace.provenance["unfinished"] is True and len(rows_of(tmp_path / "t")) == 18


def test_a_run_killed_before_its_first_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    with torch.inference_mode():
        capture = Capture(model, tmp_path / "t").__enter__()
        model(input_ids=torch.arange(6)[None])
    for handle in capture._handles:
        handle.remove()
    with pytest.raises(TraceError):
        open_trace(str(tmp_path / "t"))


def test_ranks_record_by_themselves_and_are_joined_in_order(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m")
    folders = [tmp_path / f"rank-{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        with Capture(model, folder, rank=rank, ranks=2), torch.inference_mode():
            for number in range(3 - rank):
                model(input_ids=torch.arange(4 + number)[None] + rank)
    assert join(folders, tmp_path / "t") == {"rows": 2 * (4 + 5), "steps": 2, "steps_left_out": 1}
    rows, trace = rows_of(tmp_path / "t"), open_trace(str(tmp_path / "t"))
    assert list(zip(rows.step_T.tolist(), rows.rank_T.tolist(), strict=True)) == [(0, 0)] * 4 + [(0, 1)] * 4 + [(1, 0)] * 5 + [(1, 1)] * 5
    assert len(set(rows.request_T.tolist())) == 4 and trace.provenance["steps_left_out"] == 1
    kernels = trace.tables("kernels")  # type: ignore[misc]
    assert kernels is not None and set(kernels["step"].tolist()) == {0, 1} and set(kernels["rank"].tolist()) == {0, 1}


def test_a_model_without_experts_and_a_strange_folder_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    with pytest.raises(ModelError, match="experts"):
        Capture(dense, tmp_path / "t")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="thesis"):
        Capture(model_of(tmp_path / "m"), tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_overhead_is_measured_on_the_same_work(tmp_path: Path) -> None:
    model, calls = model_of(tmp_path / "m"), []
    with torch.inference_mode():
        cost = overhead(model, lambda: calls.append(model(input_ids=torch.arange(8)[None])), tmp_path / "o", pairs=2)
    assert len(calls) == 5 and cost["recording_s"] > 0 and cost["overhead"] == pytest.approx(cost["recording_s"] / cost["without_s"] - 1)


def test_the_command_runs_a_text_through_a_checkpoint_and_says_what_ran(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model_of(config(folder)).save_pretrained(folder)
    assert any(folder.glob("*.safetensors"))
    (tmp_path / "book.txt").write_text(TEXT)
    job = Job(
        model=str(folder),
        target=tmp_path / "t",
        text=tmp_path / "book.txt",
        tokens=96,
        prompt=16,
        batch=2,
        generate=2,
        train=1,
        weights=True,
        profile=1,
        threads=1,
    )
    report = run(job)
    assert report is not None
    assert report["schema"] == "moesim.capture/1" and report["weights"] == "checkpoint" and report["rows"] == 96 + 6 + 32 and report["steps"] == 3 * 2 + 1
    trace = open_trace(str(tmp_path / "t"))
    assert trace.provenance["input"] == "text" and trace.provenance["model_weights"] == "checkpoint"
    kernels = trace.provenance["kernels"]
    assert any("mm" in kernel["name"] and kernel["stage"] == "experts" and kernel["pairs"] == 2 * 16 * 2 * 3 for kernel in kernels)
    assert all(kernel["seconds"] >= 0 and kernel["calls"] > 0 and kernel["tokens"] == 2 * 16 for kernel in kernels)
    # four experts' worth of [rows, 32] × [32, 32] and [rows, 16] × [16, 32] in three layers: what a multiplication is given is bounded by its weights and rows
    products = [kernel for kernel in kernels if kernel["name"] == "aten::_grouped_mm" and kernel["stage"] == "experts"]
    assert all(kernel["bytes"] >= 4 * 3 * 8 * 32 * (32 + 16) for kernel in products)
    again = tmp_path / "again"
    run(Job(model=str(folder), target=again, text=tmp_path / "book.txt", tokens=96, prompt=16, batch=2, generate=2, weights=True, threads=1))
    first, second = rows_of(tmp_path / "t"), rows_of(again)
    assert (first.experts_TLK[: len(second)] == second.experts_TLK).all(), "the same text takes the same routes"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA events and side streams exist nowhere else")
def test_on_a_gpu_stages_are_timed_by_events(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m").cuda()
    with Capture(model, tmp_path / "t"), torch.inference_mode():
        for _ in range(4):
            model(input_ids=torch.arange(16, device="cuda")[None], use_cache=False)
    trace = open_trace(str(tmp_path / "t"))
    kernels = trace.tables("kernels")  # type: ignore[misc]
    assert trace.num_rows == 64 and kernels is not None and set(kernels["step"].tolist()) == {0, 1, 2, 3}


def test_the_command_prints_one_object_with_what_recording_costs(tmp_path: Path) -> None:
    folder = config(tmp_path / "m")
    flags = ("--model", str(folder), "-o", str(tmp_path / "t"), "--threads", "1")
    found = moesim("capture", *flags, "--tokens", "64", "--prompt", "16", "--predictions", "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["schema"] == "moesim.capture/1" and report["rows"] == 64 and set(report["overhead"]) == {"without_ms", "recording_ms", "share"}
    assert not list(tmp_path.glob(".t.overhead*")), "the scratch trace is gone"
    assert rows_of(tmp_path / "t").predicted_TLK is not None
    (tmp_path / "empty").write_text("")
    for more, reason in ((("--text", str(tmp_path / "empty")), "tokens"), (("--device", "tpu"), "--device"), (("--scale", "huge"), "--scale")):
        refused = moesim("capture", *flags, *more)
        assert refused.returncode == 2 and reason in refused.stderr and "Traceback" not in refused.stderr
