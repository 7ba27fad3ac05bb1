"""Memory tiers: capacity, categories, pins, write-back, the tree."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InputError, SimulationError
from moesim.hardware.cluster import Cluster, Device, Link, Tier
from moesim.sim.stores import Item, Store, StoreTree


def cluster() -> Cluster:
    gpu = Device(name="g", kind="gpu", peak_flops={"bfloat16": 1.0}, num_sms=1, gemm_efficiency=1.0, memory_efficiency=1.0, kernel_launch_s=0.0)
    tiers = {
        "nvme": Tier(name="nvme", capacity_bytes=1000, read_Bps=1.0, write_Bps=1.0, attached_to="node", shared=True, link="disk"),
        "hbm": Tier(name="hbm", capacity_bytes=100, read_Bps=100.0, write_Bps=100.0),
        "dram": Tier(name="dram", capacity_bytes=400, read_Bps=10.0, write_Bps=10.0, attached_to="node", shared=True, link="host"),
        "sram": Tier(name="sram", capacity_bytes=10, read_Bps=1000.0, write_Bps=1000.0),
    }
    links = {"host": Link(name="host", bandwidth_Bps=1.0, latency_s=0.0)}
    return Cluster(name="box", device=gpu, tiers=tiers, links=links, devices_per_node=2, num_nodes=2)


def test_tree_of_a_cluster_goes_from_each_device_through_its_node() -> None:
    machine = cluster()
    tree = StoreTree.from_cluster(machine)
    assert [store.name for store in tree.chain(tree.stores["sram[3]"])] == ["sram[3]", "hbm[3]", "dram[node 1]", "nvme[node 1]"]
    assert len(tree.stores) == 4 * 2 + 2 * 2
    assert tree.at(machine, "dram", 0) is tree.at(machine, "dram", 1) is not tree.at(machine, "dram", 2)
    assert tree.at(machine, "hbm", 0) is not tree.at(machine, "hbm", 1)
    assert tree.stores["dram[node 0]"].link == "host"
    with pytest.raises(InputError, match=r"box: tier = 'ufs' is not a tier of this machine; it has dram, hbm, nvme, sram"):
        tree.at(machine, "ufs", 0)


@pytest.mark.parametrize("seed", range(20))
def test_residency_is_never_negative_and_never_above_capacity(seed: int) -> None:
    """Random puts, evictions, reserves and releases against a plain dictionary."""
    rng = np.random.Generator(np.random.PCG64(seed))
    page = int(rng.integers(1, 4))
    store = Store(name="hbm[0]", tier="hbm", capacity_bytes=60, page_bytes=page)
    held: dict[Item, int] = {}
    reserved = peak = refused = 0
    for _ in range(200):
        item = Item(layer=int(rng.integers(2)), expert=int(rng.integers(4)), plane=int(rng.integers(-1, 2)))
        size = -(-int(rng.integers(0, 25)) // page) * page
        action = rng.integers(4)
        try:
            if action == 0:
                store.put(item, size)
                assert item not in held
                held[item] = size
            elif action == 1:
                assert store.evict(item) == 0
                del held[item]
            elif action == 2:
                reserved += store.reserve("kv", size)
            else:
                store.release("kv", size)
                reserved -= size
        except SimulationError:
            refused += 1
            if action == 0:
                assert item in held or sum(held.values()) + reserved + size > 60
            elif action == 1:
                assert item not in held
            elif action == 2:
                assert sum(held.values()) + reserved + size > 60
            else:
                assert size > reserved
        total = sum(held.values()) + reserved
        peak = max(peak, total)
        assert store.used_bytes == total == sum(store.used.values()) and store.free_bytes == 60 - total and 0 <= total <= 60
        assert store.used.get("kv", 0) == reserved and set(store) == set(held) and store.peak_bytes == peak
    assert 20 < refused < 180


def test_what_does_not_fit_is_named_with_the_bytes_missing() -> None:
    store = Store(name="hbm[3]", tier="hbm", capacity_bytes=2048)
    store.reserve("kv", 1024)
    with pytest.raises(SimulationError, match=r"layer 2 expert 7 int4 weights: does not fit hbm\[3\], 512 B are missing; .* <= 2 KiB and there are kv 1 KiB"):
        store.put(Item(layer=2, expert=7, precision="int4"), 1536)
    assert store.used_bytes == 1024


def test_read_only_weights_leave_free_and_training_state_is_written_back() -> None:
    tree = StoreTree.from_cluster(cluster())
    hbm, dram = tree.stores["hbm[0]"], tree.stores["dram[node 0]"]
    weights = Item(layer=0, expert=1)
    moments = Item(layer=0, expert=1, category="optimizer", writable=True)
    hbm.put(weights, 10)
    hbm.put(moments, 40)
    assert tree.evict(weights, hbm) == 0 and weights not in dram
    assert tree.evict(moments, hbm) == 40 and dram.used == {"optimizer": 40} and hbm.used_bytes == 0


def test_training_state_stays_where_its_write_back_does_not_fit_or_has_no_place() -> None:
    dram = Store(name="dram", tier="dram", capacity_bytes=30)
    hbm = Store(name="hbm", tier="hbm", capacity_bytes=100, parent=dram)
    moments = Item(layer=0, category="optimizer", writable=True)
    hbm.put(moments, 40)
    with pytest.raises(SimulationError, match="layer 0 dense optimizer: does not fit dram, 10 B are missing"):
        StoreTree([dram, hbm]).evict(moments, hbm)
    assert moments in hbm and hbm.used_bytes == 40 and dram.used_bytes == 0
    dram.put(moments, 20)
    with pytest.raises(SimulationError, match="20 B of training state must be written back and no tier lies behind it"):
        dram.evict(moments)


def test_pinned_objects_are_not_evicted_until_unpinned() -> None:
    store = Store(name="hbm", tier="hbm", capacity_bytes=10)
    item = Item(layer=0, expert=0)
    store.put(item, 4, pinned=True)
    with pytest.raises(SimulationError, match="is pinned in hbm"):
        store.evict(item)
    store.pin(item, False)
    assert store.evict(item) == 0


def test_copies_and_bit_planes_are_objects_of_their_own() -> None:
    tree = StoreTree.from_cluster(cluster())
    hbm, dram, nvme = (tree.stores[name] for name in ("hbm[0]", "dram[node 0]", "nvme[node 0]"))
    planes = [Item(layer=0, expert=0, plane=plane) for plane in (2, 3, 4)]
    for plane in planes:
        nvme.put(plane, 5)
    dram.put(planes[0], 5)
    hbm.put(planes[0], 5)
    assert tree.copies(planes[0]) == [nvme, dram, hbm]
    assert [store.name for store in tree.source(planes[1], hbm)] == ["hbm[0]", "dram[node 0]", "nvme[node 0]"]
    assert tree.source(planes[0], hbm) == [hbm]
    with pytest.raises(SimulationError, match="plane 2 weights: is in hbm.0. already"):
        hbm.put(planes[0], 5)
    with pytest.raises(SimulationError, match="layer 9 dense weights: has no copy in hbm"):
        tree.source(Item(layer=9), hbm)


def test_a_surge_raises_the_peak_and_leaves_nothing() -> None:
    store = Store(name="hbm", tier="hbm", capacity_bytes=100)
    store.reserve("weights", 50)
    store.surge("staging", 30, "new experts")
    assert store.used_bytes == 50 and store.peak_bytes == 80 and store.peak == {"weights": 50, "staging": 30}
    with pytest.raises(SimulationError, match="new experts: does not fit hbm, 1 B are missing"):
        store.surge("staging", 51, "new experts")


def test_peaks_are_of_the_fullest_store_of_a_tier() -> None:
    tree = StoreTree.from_cluster(cluster())
    tree.stores["hbm[0]"].reserve("weights", 30)
    tree.stores["hbm[1]"].reserve("weights", 70)
    tree.stores["hbm[1]"].release("weights", 70)
    assert tree.peaks() == {"sram": 0, "hbm": 70, "dram": 0, "nvme": 0}


def test_impossible_stores_are_refused() -> None:
    with pytest.raises(InputError, match="category = 'gold' must be one of weights, kv"):
        Store(name="s", tier="s", capacity_bytes=9).reserve("gold", 1)
    with pytest.raises(SimulationError, match="bytes = -1 must be finite and >= 0"):
        Store(name="s", tier="s", capacity_bytes=9).reserve("kv", -1)
    with pytest.raises(InputError, match="capacity = -1 must be finite and >= 0"):
        Store(name="s", tier="s", capacity_bytes=-1)
    a, b = Store(name="a", tier="s", capacity_bytes=9), Store(name="b", tier="s", capacity_bytes=9)
    a.parent, b.parent = b, a
    with pytest.raises(InputError, match="is refilled from itself; stores must form a tree"):
        StoreTree([a, b])
    with pytest.raises(InputError, match="must be distinct"):
        StoreTree([a, Store(name="a", tier="s", capacity_bytes=9)])
