"""The workers that stages request, on one machine and on clusters that may grow."""

import re
from pathlib import Path

import faiss
import pytest
import ray

from elfs_ray.config import Config, ConfigError
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.cluster import Devices, devices_of_cluster
from elfs_ray.runtime.resources import Request, check_request, describe_shortage
from elfs_ray.stages.train import request_proxy_workers
from tests.tables import digits_config

GIB = 1 << 30
FIXED = Devices(96, 8, "in the Ray cluster now", node_cpus=48, node_memory_bytes=100 * GIB)
EMPTY = Devices(0, 0, "in the Ray cluster now", node_cpus=0, node_memory_bytes=0, may_grow=True)
SMALL = Devices(4, 0, "in the Ray cluster now", node_cpus=4, node_memory_bytes=GIB, may_grow=True)


@pytest.fixture
def faiss_for_gpus(monkeypatch):
    """Let faiss look like a build for GPUs, so that the neighbour search may run on them."""
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)


def config(*overrides: str) -> Config:
    return digits_config(Path("/run"), "embed.num_workers=null", "cluster.num_workers=null", *overrides)


def requests_of(name: str, devices: Devices, *overrides: str) -> list[Request]:
    (stage,) = (stage for stage in STAGES if stage.name == name)
    return stage.requests(config(*overrides), devices)


def described(stage: str, devices: Devices, *overrides: str) -> str:
    return ", ".join(request.describe() for request in requests_of(stage, devices, *overrides))


def refusal(stage: str, devices: Devices, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        for request in requests_of(stage, devices, *overrides):
            check_request(request, devices)
    return str(caught.value)


def shortages(stage: str, devices: Devices, *overrides: str) -> list[str]:
    """Return what a stage must wait for; fail if its requests are refused."""
    requests = requests_of(stage, devices, *overrides)
    for request in requests:
        check_request(request, devices)
    return [shortage for request in requests if (shortage := describe_shortage(request, devices))]


def test_without_a_number_of_workers_a_stage_requests_all_gpus():
    assert described("embed", FIXED) == "8 encoders of 1 CPU, 1 GPU"
    assert described("cluster", FIXED, "cluster.device=cpu") == "96 shards of 1 CPU"
    assert described("train", FIXED, "train.reading=memory") == "8 workers of 1 CPU, 1 GPU"
    assert described("train", FIXED, "train.network=linear") == "1 worker of 1 CPU, 1 GPU"
    assert described("pretrain", FIXED, "pretrain.num_workers=4", "pretrain.reading=memory") == (
        "4 workers of 1 CPU, 1 GPU"
    )
    assert described("index", FIXED) == described("select", FIXED) == ""


def test_workers_share_the_cpus_but_for_gpus_with_their_images_in_memory():
    assert described("train", FIXED, "train.device=cpu", "train.num_workers=4") == "4 workers of 24 CPUs"
    assert described("train", FIXED, "train.num_workers=2-6", "train.reading=streamed") == (
        "2 to 6 workers of 16 CPUs, 1 GPU"
    )
    assert described("train", FIXED, "train.augmentation=resized_crop_flip") == "8 workers of 12 CPUs, 1 GPU"
    assert described("train", FIXED, "train.reading=streamed", "train.cpus_per_worker=3") == (
        "8 workers of 3 CPUs, 1 GPU"
    )
    temi = ("cluster.method=temi", "cluster.device=cpu", "cluster.num_workers=1", "cluster.temi.num_workers=4")
    assert described("cluster", FIXED, *temi) == "1 shard of 1 CPU, 4 TEMI workers of 24 CPUs"


def test_a_share_of_the_cpus_fits_on_a_node():
    assert described("train", FIXED, "train.device=cpu") == "1 worker of 48 CPUs"


def test_both_numbers_of_cpus_are_said_while_the_reading_is_open():
    """Only stage embed tells whether the images fit in memory."""
    assert described("train", FIXED) == "8 workers of 1 to 12 CPUs, 1 GPU"
    assert described("pretrain", FIXED) == "8 workers of 1 to 12 CPUs, 1 GPU"
    assert request_proxy_workers(config(), FIXED, "memory").describe() == "8 workers of 1 CPU, 1 GPU"
    assert request_proxy_workers(config(), FIXED, "streamed").describe() == "8 workers of 12 CPUs, 1 GPU"


def test_tasks_on_gpus_are_requested(faiss_for_gpus):
    assert described("neighbors", FIXED, "cluster.num_neighbors=5") == ("1 to 8 neighbour search tasks of 1 CPU, 1 GPU")
    assert described("neighbors", FIXED, "cluster.num_neighbors=5", "cluster.neighbor_search=ivf") == ""
    assert described("select", FIXED, "select.hard_fraction=search") == "1 to 8 training tasks of 1 CPU, 1 GPU"
    assert described("select", FIXED, "select.hard_fraction=search", "train.device=cpu") == ""


@pytest.mark.parametrize(
    ("stage", "overrides", "remedy"),
    [
        ("embed", (), "no CPU .*: give embed.num_workers=..., and embed.device=cuda"),
        ("cluster", (), "no CPU .*: give cluster.num_workers="),
        ("cluster", ("cluster.method=temi", "cluster.num_workers=8"), "give cluster.temi.num_workers=.*cluster.device"),
        ("train", (), "no CPU .*: give train.num_workers="),
        ("pretrain", ("pretrain.device=cuda",), "no GPU .*: give pretrain.num_workers="),
    ],
)
def test_a_cluster_without_nodes_needs_a_number_of_workers(stage, overrides, remedy):
    assert re.search(remedy, refusal(stage, EMPTY, *overrides))


def test_a_request_is_described_with_its_range_cpus_and_memory(faiss_for_gpus):
    overrides = ("embed.num_workers=2-16", "embed.cpus_per_worker=4", "embed.memory_gib=7.5")
    assert described("embed", FIXED, *overrides) == "2 to 16 encoders of 4 CPUs, 1 GPU, 7.5 GiB"
    assert described("cluster", FIXED, "cluster.method=temi", "cluster.temi.num_workers=2") == (
        "8 shards of 1 CPU, 1 GPU, 2 TEMI workers of 1 CPU, 1 GPU"
    )


def test_more_than_a_cluster_of_fixed_size_has_is_refused():
    assert refusal("train", FIXED, "train.num_workers=9", "train.cpus_per_worker=1") == (
        "train.num_workers requests 9 workers of 1 CPU, 1 GPU: 9 GPUs in all, and there are 8 in the Ray cluster "
        "now: lower it, or use a larger cluster (ray_address)"
    )
    assert shortages("train", FIXED, "train.num_workers=8-16") == []
    assert "100 CPUs in all" in refusal("embed", FIXED, "embed.device=cpu", "embed.num_workers=100")
    assert "more than the 48 CPUs of the largest node" in refusal("train", FIXED, "train.cpus_per_worker=49")
    assert "more than the 100.0 GiB" in refusal("cluster", FIXED, "cluster.memory_gib=101")


def test_a_cluster_that_may_grow_accepts_larger_requests_as_shortages():
    for devices in (EMPTY, SMALL):
        (shortage,) = shortages("train", devices, "train.num_workers=9", "train.device=cuda", "train.cpus_per_worker=4")
        assert f"9 workers of 4 CPUs, 1 GPU: 36 CPUs in all, and there are {devices.num_cpus} in the" in shortage
    (shortage,) = shortages("cluster", SMALL, "cluster.memory_gib=2")
    assert "more than the 1.0 GiB" in shortage
    assert shortages("embed", SMALL, "embed.num_workers=4-64") == []


def test_a_gpu_where_there_can_be_none_is_refused():
    none = Devices(8, 0, "on this machine", 8)
    assert "train.device=cuda, but there is no GPU on this machine" in refusal("train", none, "train.device=cuda")


def test_several_pretraining_workers_are_refused_on_cpus():
    assert described("pretrain", FIXED, "pretrain.device=cpu") == "1 worker of 48 CPUs"
    message = refusal("pretrain", FIXED, "pretrain.device=cpu", "pretrain.num_workers=2")
    assert "pretrain.num_workers=2 on CPUs" in message and "give pretrain.num_workers=1" in message


def test_devices_are_described_in_one_line():
    assert FIXED.describe() == "96 CPUs and 8 GPUs in the Ray cluster now"


def test_only_a_cluster_that_was_joined_may_grow(ray_cluster):
    """The worker here has joined the cluster, as the driver of a submitted job does."""
    assert not devices_of_cluster().may_grow
    assert ray.get(ray.remote(devices_of_cluster).remote()).may_grow
