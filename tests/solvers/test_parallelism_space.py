"""The declared space: enumeration equals brute force over all degrees, without duplicates."""

from __future__ import annotations

import itertools

import pytest

from moesim.costs.group import Group
from moesim.errors import InputError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism.space import Shape, Space, ratios, shapes
from tests.solvers.parallelism_toys import machine, tiny


def brute(space: Space, model: MoEModel, cluster: Cluster) -> set[tuple[int, ...]]:
    """Return (tp, dp, ep, expert_tp, slots, pp) of every consistent instance, rule by rule."""
    total, node = space.devices or cluster.num_ranks, cluster.devices_per_node
    result: set[tuple[int, ...]] = set()
    every = range(1, total + 1)

    def aligned(count: int) -> bool:
        return node % count == 0 or count % node == 0

    for tp, dp, ep, shards, pp in itertools.product(every, every, every, every, space.pp):
        if tp * dp * pp > total or pp > model.num_layers or tp * dp != ep * shards and model.moe_layer_ids:
            continue
        if not all(aligned(count) for count in (tp, shards, tp * dp, tp * dp * pp)):
            continue
        if any(chosen is not None and one not in chosen for chosen, one in ((space.tp, tp), (space.dp, dp), (space.ep, ep), (space.expert_tp, shards))):
            continue
        if model.attention.num_heads % tp or (len(model.moe_layer_ids) < model.num_layers and model.dense_ffn_size % tp):
            continue
        if not model.moe_layer_ids:
            if dp == ep == shards == 1:
                result.add((tp, dp, ep, shards, 0, pp))
            continue
        if model.expert_ffn_size % shards:
            continue
        for extra in space.redundant:
            if (model.num_experts + extra) % ep == 0 and (model.num_experts + extra) // ep <= model.num_experts:
                result.add((tp, dp, ep, shards, (model.num_experts + extra) // ep, pp))
    return result


def flat(shape: Shape) -> tuple[int, ...]:
    group: Group = shape.group
    return group.tp, group.dp, group.ep, group.expert_tp, group.slots, shape.pp


@pytest.mark.parametrize(
    ("space", "model", "cluster"),
    [
        (Space(redundant=(0, 4)), tiny(), machine(8)),
        (Space(redundant=(0, 1, 2, 3, 4)), tiny(layers=3, dense=0, experts=6), machine(4, 3)),
        (Space(redundant=(0, 2), pp=(1, 3)), tiny(layers=6), machine(6, 2)),
        (Space(tp=(1, 2), ep=(4, 8), redundant=(0,)), tiny(), machine(8, 2)),
        (Space(pp=(1, 2, 4)), tiny(layers=2, dense=2), machine(8)),
        (Space(devices=6, redundant=(0, 4), pp=(1, 2)), tiny(), machine(2, 5)),
    ],
)
def test_enumeration_equals_brute_force(space: Space, model: MoEModel, cluster: Cluster) -> None:
    found = [flat(shape) for shape in shapes(space, model, cluster)]
    assert len(found) == len(set(found)), "a shape twice"
    assert set(found) == brute(space, model, cluster)
    assert found


def test_ratios_use_every_device() -> None:
    for total, first, second in itertools.product(range(1, 20), range(1, 9), range(1, 9)):
        expected = [(p, d) for p in range(1, total + 1) for d in range(1, total + 1) if p * first + d * second == total]
        assert list(ratios(total, first, second)) == expected


@pytest.mark.parametrize("values", [{"pp": (0,)}, {"batch": ()}, {"tp": (1, 1)}, {"modes": ("other",)}, {"memory_share": 1.5}, {"staging_experts": -1}])
def test_senseless_spaces_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match=f"space: {next(iter(values))} = "):
        Space(**values)


def test_more_devices_than_the_cluster_has_are_refused() -> None:
    with pytest.raises(InputError, match="devices = 9 must be an integer in 1..8"):
        shapes(Space(devices=9), tiny(), machine(8))
