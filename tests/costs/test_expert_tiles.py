"""Experts on an older generation: terms by hand, coefficients that are found again, the two groups of tiles, and where none of it applies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.api.validation_kernels import validate_kernels
from moesim.costs import CostModel
from moesim.costs.expert_tiles import Load, OlderDevice, balanced_grid, default_rows, fit
from moesim.costs.gemm import Gemm
from moesim.costs.provenance import Policy, Provenance
from moesim.costs.roofline import Roofline
from moesim.costs.tables import Tables
from moesim.errors import CostError
from moesim.hardware import Cluster, load_cluster
from moesim.model import load_model


def loads(tokens: list[float], experts: float = 8.0, top_k: float = 2.0, hidden: float = 1024.0, width: float = 512.0) -> Load:
    return Load(hidden=hidden, width=width, experts=experts, tokens=np.array(tokens), assignments=np.array(tokens) * top_k)


def bare(name: str) -> Cluster:
    return replace(load_cluster(name), tables=None)


def device(cluster: Cluster) -> OlderDevice:
    tables, policy = Tables(cluster, "vllm"), Policy(strict=False, place="test")
    return OlderDevice(cluster, tables, Gemm(tables, Roofline(cluster, tables, policy), policy))


def test_terms_are_bytes_over_bandwidth_and_padded_flops_over_the_peak() -> None:
    cluster = load_cluster("a100-sxm-8")
    weights = 3 * 1024 * 512
    terms = loads([2.0, 100.0]).terms(cluster)
    # 4 choices of 2 tokens activate 4 experts and pad each to 16 rows; 25 rows an expert are padded to 64.
    assert terms[0] == pytest.approx([1, 2 * 4 * weights / 2.039e12, 4 * 6 * 1536 / 2.039e12, 2 * weights * 4 * 16 / 312e12])
    assert terms[1] == pytest.approx([1, 2 * 8 * weights / 2.039e12, 200 * 6 * 1536 / 2.039e12, 2 * weights * 8 * 64 / 312e12])


def test_the_coefficients_of_the_law_are_found_again_and_none_is_negative() -> None:
    cluster = load_cluster("h100-sxm-8")
    terms = np.concatenate([loads([1.0, 4, 16, 100, 500, 4000], width=width).terms(cluster) for width in (256.0, 512, 4096)])
    wanted = np.array([2e-5, 1.1, 1.3, 2.5])
    assert fit(terms, terms @ wanted) == pytest.approx(wanted, rel=1e-6)
    seconds = terms @ wanted
    seconds[3] *= 5.0
    assert fit(terms, seconds) == pytest.approx(wanted, rel=1e-2), "one wrong row does not move the rest"
    assert (fit(terms, terms @ np.array([2e-5, 1.1, 0.0, 2.5]) - terms[:, 2] * 0.01) >= 0).all()


def test_the_slower_group_of_shapes_ran_default_tiles() -> None:
    cluster, tokens = load_cluster("h100-sxm-8"), [64.0, 512, 1024, 4096]
    terms = loads(tokens).terms(cluster)
    parts = [terms @ np.array([0.0, 1.0, 1.0, cost]) for cost in (1.2, 3.3, 1.4, 3.0)]
    four = loads(tokens * 4)
    slow = default_rows(four, np.concatenate(parts), np.tile(terms, (4, 1)), np.repeat(np.arange(4), 4))
    assert slow.reshape(4, 4).all(axis=1).tolist() == [False, True, False, True] and slow.sum() == 8


def test_faster_memory_or_tiles_are_never_slower_and_experts_one_by_one_are_the_most() -> None:
    cluster = bare("a800-sxm-8")
    load = loads([1.0, 64, 4096], experts=8.0, hidden=4096.0, width=14336.0)
    once = device(cluster).seconds(load)
    assert once is not None and (np.diff(once) > 0).all()
    peaks = {name: 2 * value for name, value in cluster.device.peak_flops.items()}
    quicker = device(replace(cluster, device=replace(cluster.device, peak_flops=peaks))).seconds(load)
    assert quicker is not None and (quicker <= once * (1 + 1e-9)).all() and quicker[-1] < 0.7 * once[-1]
    # 8 × 1024 tokens through 3 · 4096 · 14336 weights: no slower than what dense products reach, no faster than the peak.
    least = 2 * 3 * 4096 * 14336 * 8192 / 312e12
    assert least < once[-1] < 2 * least


@pytest.mark.parametrize("name", ["h100-sxm-8", "h800-sxm-8", "h200-sxm-8", "l40s-8"])
def test_devices_of_the_donors_generation_or_without_one_are_left_alone(name: str) -> None:
    assert device(bare(name)).coefficients is None


def test_the_cost_model_takes_it_for_unquantised_experts_and_says_that_it_is_extrapolated() -> None:
    cluster = bare("a800-sxm-8")
    tokens = np.full((1, 128), 9)
    timed = CostModel(cluster, load_model("qwen3-30b-a3b"), backend="vllm").experts(tokens)
    law = device(cluster).seconds(Load(hidden=2048.0, width=768.0, experts=128.0, tokens=np.array([144.0]), assignments=np.array([1152.0])))
    assert law is not None and timed.seconds[0] == pytest.approx(law[0], rel=0.02) and timed.provenance[0] == Provenance.EXTRAPOLATED
    with pytest.raises(CostError, match="--strict refuses"):
        CostModel(cluster, load_model("qwen3-30b-a3b"), backend="vllm", strict=True).experts(tokens)


def test_the_grid_has_both_sides_of_every_step() -> None:
    grid = balanced_grid(128, 8)
    assert (np.diff(grid) > 0).all() and grid[0] == 1 and {128 * 8, 128 * 9, 128 * 64, 128 * 65} <= set(grid.tolist())
    assert balanced_grid(1, 1)[0] == 1


@pytest.mark.parametrize(("name", "limit", "bias"), [("a800-sxm-8", 0.25, 0.1), ("a100-sxm-8", 0.2, 0.15)])
def test_grouped_products_of_amperes_are_predicted_from_an_h100(name: str, limit: float, bias: float) -> None:
    found = validate_kernels(None, name, only=("grouped_gemm",))["quantities"]["grouped_gemm_frontier"]["transfer"]
    assert found["median_abs_error"] <= limit and abs(found["mean_error"]) <= bias and set(found["provenance"]) == {"extrapolated"}
