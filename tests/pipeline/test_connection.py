"""Which runs start Ray, and which do without."""

import pytest
import ray

from elfs_ray.config import load_config
from elfs_ray.pipeline import connection
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.presets import preset
from elfs_ray.runtime import cluster
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage.run_dir import RunDir
from tests.tables import mark


@pytest.fixture
def connects(monkeypatch, tmp_path):
    """Return a function that tells whether a run by coverage, with more keys, connects to Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray would note a cluster that was started by hand
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "listen", lambda listener: None)

    def connects(*keys: str, num_images: int = 0) -> bool:
        run_dir = RunDir(tmp_path)
        if num_images:
            mark(run_dir, IndexResult(num_images, 1, "folder", []))
        connected = []
        monkeypatch.setattr(cluster, "connect", lambda address, **options: connected.append(address))
        overrides = [f"pool.uri={tmp_path}", f"run_dir={tmp_path}", "budget=5", "select.method=coverage", *keys]
        config = load_config(preset("photos"), overrides)
        connection.connect_if_needed(config, run_dir, stages_of(config))
        return bool(connected)

    return connects


def test_a_small_pool_on_one_machine_needs_no_ray(connects, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert not connects() and not connects("select.method=auto")
    assert not connects(num_images=connection.MAX_IMAGES_WITHOUT_RAY)
    assert connects(num_images=connection.MAX_IMAGES_WITHOUT_RAY + 1)


TRAINS = (
    "select.method=double_end",
    "select.hard_fraction=search",
    "train.network=small_cnn",
    "cluster.num_clusters=3",
)


@pytest.mark.parametrize(
    "keys",
    [
        ["ray_address=local"],
        TRAINS,
        [*TRAINS, "train.num_workers=1", "train.network=linear", "select.hard_fraction=0.3"],
        ["select.method=auto", "cluster.method=temi", "cluster.num_clusters=3"],
        ["embed.encoder=self_supervised"],
    ],
)
def test_one_training_worker_needs_no_ray(connects, monkeypatch, keys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert not connects(*keys)


@pytest.mark.parametrize(
    "keys",
    [
        [*TRAINS, "train.num_workers=2"],
        [*TRAINS, "train.num_workers=1-4"],
        [*TRAINS, "train.reading=streamed"],
        [*TRAINS, "train.augmentation=resized_crop_flip"],
        [*TRAINS, "embed.proxy_image_size=300"],
        [*TRAINS, "train.memory_gib=1"],
        ["embed.encoder=self_supervised", "pretrain.reading=streamed"],
        ["select.method=auto", "cluster.method=temi", "cluster.num_clusters=3", "cluster.temi.num_workers=2"],
        ["select.method=auto", "cluster.memory_gib=1"],
        ["label_selector=zone=a"],
        ["embed.label_selector=zone=a"],
    ],
)
def test_workers_streams_labels_and_memory_need_ray(connects, monkeypatch, keys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert connects(*keys)


def test_gpus_and_clusters_of_the_environment_are_used(connects, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert connects()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert connects()
