"""Times of one device from another's tables and two data sheets: closed forms, what strictness refuses, where the donor is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.costs import CostModel, Provenance
from moesim.costs.provenance import Timing
from moesim.costs.tables import Tables
from moesim.costs.transfer import NEEDED, factors, peak_flops
from moesim.errors import CostError, HardwareError
from moesim.hardware import Cluster, load_cluster
from moesim.model import MoEModel, load_model

KINDS = ("gemm", "moe", "wideep_moe_generation", "attn_context", "attn_generation", "mla_generation", "wideep_mla_generation", "nccl", "deepep_ll_1to8nodes")


def bare(cluster: Cluster, **changes: object) -> Cluster:
    """The device without its own tables, with an H100 as donor."""
    return replace(cluster, **{"tables": None, "calibrated_from": "h100-sxm", **changes})  # type: ignore[arg-type]


def faster(cluster: Cluster, *, flops: float = 1.0, memory: float = 1.0, links: float = 1.0) -> Cluster:
    """The same device with other figures on its data sheet."""
    device = replace(cluster.device, peak_flops={name: value * flops for name, value in cluster.device.peak_flops.items()})
    tiers = {name: replace(tier, read_Bps=tier.read_Bps * (memory if name == "hbm" else 1.0)) for name, tier in cluster.tiers.items()}
    ports = {name: replace(link, bandwidth_Bps=link.bandwidth_Bps * links) for name, link in cluster.links.items()}
    return replace(cluster, device=device, tiers=tiers, links=ports)


@pytest.mark.parametrize("kind", KINDS)
def test_transfer_to_an_equal_device_changes_nothing_but_the_class(h100: Cluster, kind: str) -> None:
    column = "dispatch_avg_t_s" if kind.startswith("deepep") else "latency_s"
    donor, copy = Tables(h100, "sglang"), Tables(bare(h100), "sglang")
    own, moved = donor.rows(kind, column), copy.rows(kind, column)
    assert own is not None and moved is not None
    np.testing.assert_allclose(moved[column], own[column], rtol=1e-12)
    assert (own.worst, moved.worst) == (Provenance.MEASURED, Provenance.EXTRAPOLATED)
    assert copy.rows(kind, column, transfer=False) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_twice_as_fast_in_everything_halves_what_is_not_overhead(h100: Cluster, kind: str) -> None:
    column = "dispatch_avg_t_s" if kind.startswith("deepep") else "latency_s"
    rows = Tables(h100, "sglang").rows(kind, *NEEDED[kind], column)
    assert rows is not None
    np.testing.assert_allclose(factors(kind, rows, h100, faster(h100, flops=2, memory=2, links=2)), 0.5)
    moved = Tables(bare(faster(h100, flops=2, memory=2, links=2)), "sglang").rows(kind, column)
    assert moved is not None
    least = rows[column].min()
    np.testing.assert_allclose(moved[column], least + (rows[column] - least) / 2)


@pytest.mark.parametrize("kind", ["stream", "sampler", "attn_mixed"])
def test_tables_of_few_shapes_move_like_full_ones(kind: str) -> None:
    donor = load_cluster("rtx-pro-6000-1")
    rows = Tables(donor, "vllm").rows(kind, *NEEDED[kind], "latency_s")
    copy = replace(donor, tables=None, calibrated_from="rtx-pro-6000")
    moved = Tables(copy, "vllm").rows(kind, "latency_s")
    assert rows is not None and moved is not None and moved.worst is Provenance.EXTRAPOLATED
    np.testing.assert_allclose(moved["latency_s"], rows["latency_s"], rtol=1e-12)
    np.testing.assert_allclose(factors(kind, rows, donor, faster(donor, flops=2, memory=2)), 0.5)
    slower = factors(kind, rows, donor, faster(donor, memory=0.5))
    assert (slower <= 2.0 + 1e-12).all() and (slower > 1.9).any() and (kind == "attn_mixed") == bool((slower < 1.1).any())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_a_copy_of_a_donor_with_few_shapes_takes_its_times(name: str) -> None:
    """Dense products of shapes that the donor's table lacks are corrected by its shapes there and here; none of these times is a bare roofline's."""
    donor, model = load_cluster("rtx-pro-6000-1"), load_model(name)
    own, copy = (CostModel(one, model, backend="vllm") for one in (donor, replace(donor, tables=None, calibrated_from="rtx-pro-6000")))
    tokens = np.array([1.0, 16.0, 100.0, 1000.0, 2048.0])
    length = np.full(5, 900.0)
    calls: list[Callable[[CostModel], Timing]] = [
        lambda costs: costs.attention_projections(tokens),
        lambda costs: costs.attention_core(phase="decode", sequences=tokens, new_tokens=tokens, context=length),
        lambda costs: costs.attention_core(phase="prefill", sequences=np.ones(5), new_tokens=tokens, context=tokens),
        lambda costs: costs.dense_ffn(tokens) if not model.moe_layer_ids else costs.gate(tokens),
        lambda costs: costs.head(tokens),
        lambda costs: costs.sampling(tokens),
    ]
    for call in calls:
        there, here = call(own), call(copy)
        np.testing.assert_allclose(here.seconds, there.seconds, rtol=0.02)
        assert set(np.unique(here.provenance)) == {Provenance.EXTRAPOLATED}
    mixed = [costs.mixed_factor(chunk=tokens, prefix=length, decodes=tokens, context=length) for costs in (own, copy)]
    np.testing.assert_allclose(mixed[1], mixed[0], rtol=0.02)
    assert mixed[0].max() > 1.2 or not model.moe_layer_ids, "Qwen3's head shape is in the table of mixed batches"


def test_memory_bound_rows_follow_the_bandwidth_and_compute_bound_ones_the_flops(h100: Cluster) -> None:
    rows = {"gemm_dtype": np.array(["bfloat16"] * 2, dtype=object), "m": np.array([1, 16384]), "n": np.array([8192] * 2), "k": np.array([8192] * 2)}
    assert factors("gemm", rows, h100, faster(h100, memory=4)).tolist() == [0.25, 1.0]
    assert factors("gemm", rows, h100, faster(h100, flops=4)).tolist() == [1.0, 0.25]
    loads = {
        "moe_dtype": np.array(["bfloat16"] * 2, dtype=object),
        "hidden_size": np.array([4096] * 2),
        "inter_size": np.array([2048] * 2),
        "active": np.array([8, 8]),
        "assignments": np.array([8, 1 << 17]),
    }
    assert factors("grouped_gemm", loads, h100, faster(h100, memory=4)).tolist() == [0.25, 1.0]


def test_few_tiles_leave_more_sms_idle_not_slower(h100: Cluster) -> None:
    rows = {"gemm_dtype": np.array(["bfloat16"], dtype=object), "m": np.array([1024]), "n": np.array([128]), "k": np.array([1 << 20])}
    twice = replace(h100, device=replace(h100.device, num_sms=264, peak_flops={name: 2 * value for name, value in h100.device.peak_flops.items()}))
    # Eight tiles run on eight SMs of either device: twice the SMs and twice the peak are no faster.
    assert factors("gemm", rows, h100, twice) == pytest.approx(1.0)


def test_a_dtype_that_the_device_lacks_computes_in_the_next_wider() -> None:
    a100 = load_cluster("a100-sxm-8")
    assert peak_flops(a100, "fp8_block") == peak_flops(a100, "bfloat16") == 312e12


def test_every_operator_of_a_device_with_a_donor_is_extrapolated(h100: Cluster, v3: MoEModel) -> None:
    costs = CostModel(bare(h100, name="copy"), v3)
    tokens = np.array([64, 4096])
    timings = [costs.attention(phase=phase, sequences=tokens, new_tokens=tokens, context=tokens + 500) for phase in ("prefill", "decode")]
    timings += [costs.gemm("test", tokens, 7168, 2048, "fp8_block"), costs.gate(tokens), costs.head(tokens), costs.experts(np.full((2, 8, 8), 30))]
    timings += [costs.all_reduce(np.array([1e6]), 8), costs.p2p(np.array([1e6]))]
    for timed in timings:
        assert (timed.provenance == Provenance.EXTRAPOLATED).all()
    assert costs.exchange("low_latency", "dispatch", assign_RR=np.full((8, 8), 16.0)).provenance.tolist() == [Provenance.EXTRAPOLATED] * 8


@pytest.mark.parametrize(
    "call",
    [
        lambda costs: costs.gemm("test", np.array([64]), 7168, 2048, "fp8_block"),
        lambda costs: costs.experts(np.ones((1, 8), dtype=np.int64)),
        lambda costs: costs.attention(phase="decode", sequences=np.ones(1), new_tokens=np.ones(1), context=np.ones(1)),
        lambda costs: costs.all_reduce(np.array([1e6]), 8),
        lambda costs: costs.p2p(np.array([1e6])),
        lambda costs: costs.embedding(np.ones(1)),
        lambda costs: costs.sampling(np.ones(1)),
        lambda costs: costs.exchange("normal", "combine", copy_RR=np.ones((8, 8))),
    ],
)
def test_strict_refuses_every_extrapolated_time(h100: Cluster, v3: MoEModel, call: Callable[[CostModel], object]) -> None:
    with pytest.raises(CostError, match="only an extrapolated estimate is left, and --strict refuses it"):
        call(CostModel(bare(h100, name="copy"), v3, strict=True))


def test_an_own_table_goes_before_the_donor(v3: MoEModel) -> None:
    h800 = load_cluster("h800-sxm-8")
    costs = CostModel(h800, v3, strict=True)
    assert costs.gemm("test", np.array([128]), 7168, 2048, "fp8_block").provenance[0] <= Provenance.CALIBRATED
    assert costs.experts(np.full((1, 8), 64)).provenance[0] <= Provenance.CALIBRATED
    with pytest.raises(CostError, match="all_reduce"):
        costs.all_reduce(np.array([1e6]), 8)


def test_the_donor_is_a_device_of_the_library(tmp_path: Path) -> None:
    def document(donor: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(f"extends: rtx-4090\nformat: moesim.hardware/1\nname: mine\ncalibrated_from: {donor}\n")
        return str(path)

    mine = load_cluster(document("h100-sxm"))
    assert mine.calibrated_from == "h100-sxm" and mine.sha256 != load_cluster("rtx-4090-1").sha256
    timed = CostModel(mine, load_model("olmoe-1b-7b")).gemm("test", np.array([64]), 4096, 4096, "bfloat16")
    assert timed.provenance[0] == Provenance.EXTRAPOLATED and timed.seconds[0] > 4096 * 4096 * 2 / 1.008e12
    with pytest.raises(HardwareError, match=r"mine.yaml: calibrated_from = 'h100' must be a device of the library; did you mean 'h100-sxm'"):
        load_cluster(document("h100"))
