"""Nodes that are lost while a stage needs them: when it is said, and what."""

from dataclasses import replace

from elfs_ray.runtime.cluster import Devices
from elfs_ray.runtime.lost_nodes import Watch
from elfs_ray.runtime.resources import Request

HERE = Devices(2, 0, "in the Ray cluster now", node_cpus=1, node_memory_bytes=1 << 30)
ONE_LEFT = replace(HERE, num_cpus=1)
SHARDS = Request("cluster", "cluster.num_workers", "shard", fewest=2, most=2, cpus=1, gpus=0, counts_devices=True)


def lines_of(*devices: Devices, request: Request = SHARDS) -> list[str | None]:
    """Return what three looks in a row find, after the devices with which the stage begins."""
    each = iter(devices)
    watch = Watch("cluster", [request], next(each), lambda: next(each), patience=2)
    return [watch.look() for _ in devices[1:]]


def test_a_lost_node_is_told_once_and_names_the_key_and_the_way_on():
    first, second, third = lines_of(HERE, ONE_LEFT, ONE_LEFT, ONE_LEFT)
    assert first is None and third is None
    assert second is not None and second.startswith("cluster   nodes were lost: cluster.num_workers requests 2 shards")
    assert "there are 1 in the Ray cluster now" in second and "type its command again" in second


def test_a_node_that_is_soon_replaced_is_not_told():
    assert lines_of(HERE, ONE_LEFT, HERE, ONE_LEFT, HERE) == [None] * 4


def test_a_node_that_is_lost_again_is_told_again():
    told = [line is not None for line in lines_of(HERE, ONE_LEFT, ONE_LEFT, HERE, ONE_LEFT, ONE_LEFT)]
    assert told == [False, True, False, False, True]


def test_workers_that_had_no_room_from_the_start_are_not_lost():
    assert lines_of(ONE_LEFT, ONE_LEFT, ONE_LEFT) == [None, None]


def test_a_stage_that_needs_fewer_workers_than_it_may_have_loses_nothing():
    assert lines_of(HERE, ONE_LEFT, ONE_LEFT, request=replace(SHARDS, fewest=1)) == [None, None]
