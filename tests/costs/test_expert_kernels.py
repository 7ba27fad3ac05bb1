"""What a call of expert kernels takes besides its work, and rows of the kernel that is known to have run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.api.documents import cluster_of, model_of
from moesim.costs.expert_kernels import fixed_s, with_fixed
from moesim.costs.model import CostModel
from moesim.costs.tables import Rows, Tables


class _Table:
    """Two shapes of a kernel whose calls take 10 µs + 0.1 µs per expert of the layer + 2 µs per activated expert; another kernel beside them."""

    def rows(self, kind: str, *names: str, where: dict[str, object]) -> Rows | None:
        if where["moe_dtype"] != "w4a16_mxfp4":
            return None
        found = Rows()
        columns: dict[str, list[object]] = {name: [] for name in names}
        for experts, topk, kernel in ((100, 4, "a_marlin"), (300, 8, "a_marlin"), (200, 4, "other")):
            for tokens in (1, 8, 64):
                seconds = 1e-5 + 1e-7 * experts + 2e-6 * min(tokens * topk, experts) if kernel != "other" else 1.0
                values = {"num_experts": experts, "topk": topk, "hidden_size": 64, "inter_size": 64, "moe_tp_size": 1, "num_tokens": tokens}
                for name, value in {**values, "latency_s": seconds, "kernel_source": kernel}.items():
                    columns[name].append(value)
        for name, values_ in columns.items():
            found[name] = np.array(values_)
        return found


def test_the_fixed_part_is_a_line_in_the_number_of_experts() -> None:
    found = fixed_s(_Table(), "w4a16_mxfp4", "marlin", np.array([100, 200, 500]))  # type: ignore[arg-type]
    assert found is not None
    np.testing.assert_allclose(found, [2e-5, 3e-5, 6e-5], rtol=1e-9)
    assert fixed_s(_Table(), "w4a16_mxfp4", "other", np.array([100])) is None  # type: ignore[arg-type]


def test_only_work_is_scaled() -> None:
    seconds = np.array([1.0, 2.0]) + 2e-5
    moved = with_fixed(seconds, 0.5, _Table(), "w4a16_mxfp4", "marlin", 100, 200)  # type: ignore[arg-type]
    np.testing.assert_allclose(moved * 0.5, np.array([0.5, 1.0]) + 3e-5, rtol=1e-9)
    assert with_fixed(seconds, 0.5, _Table(), "w4a16_mxfp4", "marlin", 100, 100) is seconds  # type: ignore[arg-type]


def test_a_kernel_that_ran_speaks_for_its_dtype() -> None:
    """Marlin multiplies 4-bit weights at about half the rate of the Triton kernels at many tokens per expert, and reads weights as fast at few."""
    cluster, model = cluster_of("h100-sxm-1"), model_of("gpt-oss-120b")
    usual, marlin = CostModel(cluster, model, backend="vllm"), CostModel(cluster, model, backend="vllm", expert_kernel="marlin")
    many, few = np.full((1, 128), 256), np.repeat([1, 0], [32, 96])[None]
    for tp in (1, 4):
        ratio_many = marlin.experts(many, expert_tp=tp).seconds / usual.experts(many, expert_tp=tp).seconds
        ratio_few = marlin.experts(few, expert_tp=tp).seconds / usual.experts(few, expert_tp=tp).seconds
        assert 1.7 < float(ratio_many[0]) < 3.5
        assert 0.6 < float(ratio_few[0]) < 1.4
    rate = 6 * many.sum() * model.hidden_size * model.expert_ffn_size / float(marlin.experts(many).seconds[0])
    assert 150e12 < rate < 300e12, "what tables of other shapes reach with this kernel"


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_kernel_that_no_row_of_the_dtype_has_changes_nothing(dtype: str) -> None:
    cluster, model = cluster_of("h100-sxm-1"), replace(model_of("qwen3-235b-a22b"), expert_dtype=dtype)
    tokens = np.full((1, 128), 40)
    usual, told = (CostModel(cluster, model, backend="vllm", expert_kernel=one).experts(tokens).seconds for one in ("", "marlin"))
    np.testing.assert_array_equal(usual, told)


def test_tables_of_the_device_tell_the_fixed_part() -> None:
    found = fixed_s(Tables(cluster_of("h100-sxm-1"), "vllm"), "w4a16_mxfp4", "marlin", np.array([128, 896]))
    assert found is not None and 1e-5 < float(found[0]) < float(found[1]) < 1e-4
