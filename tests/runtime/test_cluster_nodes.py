"""A cluster of several nodes gives the results of a single one, even where it loses a node in every stage."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.tables import contents, digit_images, png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).with_name("nodes_run.py")
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--mount"]
MAY_UNSHARE = shutil.which("ip") and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset")
UNTRAINED = ("index", "embeddings", "neighbors", "duplicates", "clusters", "coreset")


@pytest.fixture
def folder():
    """Yield a folder in /tmp, because the paths of Ray's sockets may have at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="en-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def pool(folder) -> Path:
    images, _ = digit_images(800)
    for number, image in enumerate(images):
        path = folder / "pool" / str(number % 8) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder / "pool"


@pytest.fixture
def overrides(pool) -> list[str]:
    return [
        *(f"pool.uri={pool}", "budget=0.25", "embed.encoder=pixels", "embed.image_size=8"),
        *("embed.proxy_image_size=8", "embed.block_images=64", "cluster.method=kmeans", "cluster.num_clusters=10"),
        *("cluster.num_tries=20", "train.network=small_cnn", "train.epochs=5", "train.batch_size=64"),
        *("train.augmentation=crop", "train.crop_padding=1", "train.num_workers=2", "train.cpus_per_worker=2"),
        *("train.max_failures=20", "select.method=double_end", "select.hard_fraction=0.2"),
    ]


@pytest.mark.parametrize("kind", ["processes", "namespaces"])
def test_a_node_lost_in_each_stage_changes_nothing(folder, overrides, kind):
    if kind == "namespaces" and not MAY_UNSHARE:
        pytest.skip("needs root, for namespaces")
    command = [sys.executable, str(SCRIPT), kind, str(folder), *overrides]
    if kind == "namespaces":
        command = [*NAMESPACES, *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert result.returncode == 0, result.stderr[-5000:]
    lost = [line for line in result.stdout.splitlines() if line.startswith("lost ")]
    assert lost == [f"lost {stage} in time" for stage in ("index", "embed", "cluster", "train", "select")]
    assert contents(folder / "three", *TABLES) == contents(folder / "one", *TABLES)


@pytest.fixture
def address(folder) -> str:
    """Yield the address of a cluster of three nodes with a CPU each."""
    cluster = Cluster(shutdown_at_exit=True)
    try:
        cluster.add_node(num_cpus=1, temp_dir=str(folder / "ray"), include_dashboard=False)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_typed_command_chooses_the_same_images_on_three_nodes(folder, pool, address):
    command = [sys.executable, "-m", "elfs_ray", "select", str(pool), "--budget", "60"]
    command += ["embed.encoder=pixels", "embed.block_images=64"]
    for name, where in {"here": "local", "nodes": address}.items():
        place = [f"ray_address={where}", f"run_dir={folder / name}"]
        ended = subprocess.run([*command, *place], capture_output=True, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr[-5000:]
    assert "3 CPUs and 0 GPUs in the Ray cluster" in ended.stderr
    chosen = (folder / "nodes" / "coreset.txt").read_text()
    assert chosen == (folder / "here" / "coreset.txt").read_text() and len(chosen.splitlines()) == 60
    assert contents(folder / "nodes", *UNTRAINED) == contents(folder / "here", *UNTRAINED)


ON_EVERY_MACHINE = """
import os, sys
import ray
from ray.cluster_utils import Cluster
from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import on_every_machine

machines = Cluster(shutdown_at_exit=True)
machines.add_node(num_cpus=0, temp_dir=sys.argv[1], include_dashboard=False)
for _ in range(2):
    machines.add_node(num_cpus=1, object_store_memory=100 << 20)
connect(machines.address)
parents = on_every_machine(lambda: os.getppid())
print(len(parents), len(set(parents)), os.getppid() in parents)
"""


def test_a_function_runs_on_every_machine_that_has_cpus(folder):
    """Each node's workers have a parent of their own."""
    command = [sys.executable, "-c", ON_EVERY_MACHINE, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout == "2 2 False\n", result.stderr[-5000:]
