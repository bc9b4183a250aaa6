"""What stages ask for, on clusters of fixed size and on those that grow."""

from pathlib import Path

import pytest
import yaml

from elfs_ray.config import Config, ConfigError
from elfs_ray.pipeline.resources import check_request, requests_of
from elfs_ray.runtime.cluster import Devices
from elfs_ray.runtime.growth import Growth, find_growth, growth_of
from tests.tables import digits_config

GIB = 1 << 30
FIXED = Devices(96, 8, "that the Ray cluster has now", node_cpus=48, node_memory_bytes=100 * GIB)
EMPTY = Devices(0, 0, "that the Ray cluster has now", node_cpus=0, node_memory_bytes=0, growth=Growth(160, 8, 48))
UNKNOWN = Devices(4, 0, "that the Ray cluster has now", node_cpus=4, node_memory_bytes=GIB, growth=Growth())
CLUSTER_CONFIGS = Path(__file__).parents[2] / "cluster_configs"


def config(*overrides: str) -> Config:
    return digits_config(Path("/run"), "cluster.num_workers=null", *overrides)


def described(stage: str, devices: Devices, *overrides: str) -> str:
    return ", ".join(request.describe() for request in requests_of(stage, config(*overrides), devices))


def refusal(stage: str, devices: Devices, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        for request in requests_of(stage, config(*overrides), devices):
            check_request(request, devices)
    return str(caught.value)


def accept(stage: str, devices: Devices, *overrides: str) -> None:
    for request in requests_of(stage, config(*overrides), devices):
        check_request(request, devices)


def test_a_stage_that_is_not_told_takes_the_gpus_that_are_there():
    assert described("embed", FIXED) == "8 encoders of 1 CPU, 1 GPU"
    assert described("cluster", FIXED, "cluster.device=cpu") == "96 shards of 1 CPU"
    assert described("train", FIXED) == "8 workers of 1 CPU, 1 GPU"
    assert described("pretrain", FIXED, "pretrain.num_workers=4") == "4 workers of 1 CPU, 1 GPU"
    assert described("index", FIXED) == described("select", FIXED) == ""


def test_on_a_cluster_without_nodes_it_takes_what_there_can_be():
    assert described("embed", EMPTY) == "8 encoders of 1 CPU, 1 GPU"
    assert described("embed", EMPTY, "embed.device=cpu") == "160 encoders of 1 CPU"


def test_ranges_cpus_and_memory_are_said():
    asked = ("embed.num_workers=2-16", "embed.cpus_per_worker=4", "embed.memory_gib=7.5")
    assert described("embed", FIXED, *asked) == "2 to 16 encoders of 4 CPUs, 1 GPU, 7.5 GiB"
    assert described("cluster", FIXED, "cluster.method=temi", "cluster.temi.num_workers=2") == (
        "8 shards of 1 CPU, 1 GPU, 2 TEMI workers of 1 CPU, 1 GPU"
    )


def test_more_than_a_cluster_of_fixed_size_has_is_refused():
    assert refusal("train", FIXED, "train.num_workers=9") == (
        "train asks for 9 workers of 1 CPU, 1 GPU: 9 GPUs in all, and there are 8 that the Ray cluster has now: "
        "lower train.num_workers, or add nodes"
    )
    accept("train", FIXED, "train.num_workers=8-16")
    assert "100 CPUs in all" in refusal("embed", FIXED, "embed.device=cpu", "embed.num_workers=100")
    assert "more than the 48 CPUs of the largest node" in refusal("train", FIXED, "train.cpus_per_worker=49")
    assert "more than the 100.0 GiB" in refusal("cluster", FIXED, "cluster.memory_gib=101")


def test_of_a_cluster_that_grows_only_what_it_can_never_have_is_refused():
    accept("train", EMPTY, "train.num_workers=8")
    assert "there can never be more than 8" in refusal("train", EMPTY, "train.num_workers=9")
    accept("train", UNKNOWN, "train.num_workers=1000", "train.device=cuda")


def test_where_neither_nodes_nor_limits_are_known_the_number_of_gpus_has_to_be_given():
    assert "embed.num_workers=null" in refusal("embed", UNKNOWN, "embed.device=cuda")
    accept("embed", UNKNOWN, "embed.device=cuda", "embed.num_workers=8")


def test_a_gpu_where_there_can_be_none_is_refused():
    none = Devices(8, 0, "of this machine", 8)
    assert "train.device=cuda, but there is no GPU of this machine" in refusal("train", none, "train.device=cuda")


def test_devices_say_how_far_they_can_grow():
    assert FIXED.describe() == "96 CPUs and 8 GPUs that the Ray cluster has now"
    assert EMPTY.describe().endswith("; it can grow to 160 CPUs and 8 GPUs")
    assert UNKNOWN.describe().endswith("; it grows, how far is not known here")


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_growth_of_the_launchers_files_is_that_of_all_their_nodes(name):
    launcher = yaml.safe_load((CLUSTER_CONFIGS / name).read_text())
    assert growth_of(launcher) == Growth(2 * 48 + 4 * 16, 8, 48, None)
    launcher["max_workers"] = 1
    assert growth_of(launcher) == Growth(48, 4, 48, None)


def test_a_node_type_of_unknown_size_makes_the_growth_unknown():
    launcher = yaml.safe_load((CLUSTER_CONFIGS / "aws.yaml").read_text())
    del launcher["available_node_types"]["cpu_spot"]["resources"]
    assert growth_of(launcher) == Growth()


def test_a_kuberay_head_with_its_autoscaler_beside_it_grows_and_one_without_does_not(monkeypatch):
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0")
    assert find_growth("127.0.0.1:1") == Growth()
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --num-cpus=0")
    assert find_growth("127.0.0.1:1") is None
