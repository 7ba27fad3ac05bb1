"""The class of a number, and what strictness refuses."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs import CostModel, Provenance
from moesim.costs.provenance import timing, total
from moesim.errors import CostError
from moesim.hardware import Cluster
from moesim.model import MoEModel, load_model


def test_a_sum_takes_the_worst_class_that_matters() -> None:
    main = timing(np.array([1.0]), Provenance.MEASURED)
    small, large = (timing(np.array([share]), Provenance.ROOFLINE) for share in (0.01, 0.5))
    assert total(main, small).provenance[0] == Provenance.MEASURED
    assert total(main, large).provenance[0] == Provenance.ROOFLINE
    assert total(main, large).seconds[0] == 1.5


def test_strict_names_operator_table_and_missing_key(bare: Cluster, v3: MoEModel) -> None:
    costs = CostModel(bare, v3, strict=True)
    with pytest.raises(CostError, match=r"bare: experts needs table moe \(none\) with moe_dtype=fp8_block, hidden_size=7168, inter_size=2048, moe_tp_size=1"):
        costs.experts(np.ones((1, 8), dtype=np.int64))
    with pytest.raises(CostError, match="exchange.dispatch needs table deepep_normal"):
        costs.exchange("normal", "dispatch", copy_RR=np.ones((8, 8)))
    with pytest.raises(CostError, match="op_name=all_reduce, num_gpus=8"):
        costs.all_reduce(np.array([1e6]), 8)
    with pytest.raises(CostError, match="gemm"):
        costs.gate(np.array([4]))


def test_strict_accepts_the_tables_of_an_h100(h100: Cluster) -> None:
    for name in ("deepseek-v3", "qwen3-235b-a22b", "mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-120b", "deepseek-v2-lite"):
        costs = CostModel(h100, load_model(name), strict=True)
        tokens = np.array([1, 64, 5000])
        for phase in ("prefill", "decode"):
            timed = costs.attention(phase=phase, sequences=tokens, new_tokens=tokens, context=tokens + 500, tp=2)
            assert (timed.seconds > 0).all() and (timed.provenance <= Provenance.CALIBRATED).all()
        for timed in (costs.gate(tokens), costs.shared_experts(tokens), costs.dense_ffn(tokens), costs.head(tokens), costs.embedding(tokens)):
            assert np.isfinite(timed.seconds).all() and (timed.provenance <= Provenance.CALIBRATED).all()
        assert costs.experts(np.full((2, 4, 8), 3)).seconds.shape == (2, 4)


def test_without_strict_the_class_says_roofline(bare: Cluster, v3: MoEModel) -> None:
    costs = CostModel(bare, v3)
    assert (costs.experts(np.ones((1, 8), dtype=np.int64)).provenance == Provenance.ROOFLINE).all()
    assert costs.fallbacks == {"experts": "moe (none): moe_dtype=fp8_block, hidden_size=7168, inter_size=2048, moe_tp_size=1"}


def test_an_unknown_engine_or_phase_is_refused(h100: Cluster, v3: MoEModel, v3_costs: CostModel) -> None:
    with pytest.raises(CostError, match="must be one of sglang, trtllm, vllm"):
        CostModel(h100, v3, backend="llama")
    with pytest.raises(CostError, match="must be one of prefill, decode"):
        v3_costs.attention(phase="train", sequences=np.ones(1), new_tokens=np.ones(1), context=np.ones(1))


@pytest.mark.parametrize("backend", ["trtllm", "vllm"])
def test_another_engine_reads_its_own_moe_table(h100: Cluster, qwen: MoEModel, qwen_costs: CostModel, backend: str) -> None:
    load = np.full((1, 128), 16)
    other = CostModel(h100, qwen, backend=backend).experts(load)
    assert other.provenance[0] == Provenance.MEASURED and other.seconds[0] != qwen_costs.experts(load).seconds[0]
