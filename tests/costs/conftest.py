"""Shared clusters and models: H100 nodes with tables, and a small machine without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesim.costs import CostModel
from moesim.hardware import Cluster, load_cluster
from moesim.model import MoEModel, load_model


@pytest.fixture(scope="session")
def h100() -> Cluster:
    return load_cluster("h100-sxm-8x4")


@pytest.fixture(scope="session")
def bare(h100: Cluster) -> Cluster:
    """The same machine without tables: rooflines only."""
    return replace(h100, name="bare", tables=None)


@pytest.fixture(scope="session")
def v3() -> MoEModel:
    return load_model("deepseek-v3")


@pytest.fixture(scope="session")
def qwen() -> MoEModel:
    return load_model("qwen3-235b-a22b")


@pytest.fixture(scope="session")
def v3_costs(h100: Cluster, v3: MoEModel) -> CostModel:
    return CostModel(h100, v3)


@pytest.fixture(scope="session")
def qwen_costs(h100: Cluster, qwen: MoEModel) -> CostModel:
    return CostModel(h100, qwen)
