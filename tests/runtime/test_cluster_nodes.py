"""A cluster that loses a node in every stage gives the tables of a single node."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tables import contents, digit_images, png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).with_name("nodes_run.py")
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--mount"]
MAY_UNSHARE = shutil.which("ip") and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset")


@pytest.fixture
def folder():
    """Yield a folder in /tmp, because the paths of Ray's sockets may have at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="en-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def overrides(folder) -> list[str]:
    images, _ = digit_images(800)
    for number, image in enumerate(images):
        path = folder / "pool" / str(number % 8) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return [
        *(f"pool.uri={folder / 'pool'}", "budget=0.25", "embed.encoder=pixels", "embed.image_size=8"),
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
