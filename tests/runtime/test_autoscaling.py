"""A cluster without worker nodes grows for a stage and shrinks after it, by Ray's autoscaler."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elfs_ray.config import load_config
from elfs_ray.pipeline.runner import run
from elfs_ray.presets import preset
from tests.tables import contents, digit_images, png

SCRIPT = Path(__file__).with_name("autoscaling_run.py")
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset")
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--mount"]
MAY_UNSHARE = shutil.which("unshare") and subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MAY_UNSHARE, reason="needs root, for namespaces"),
]


@pytest.fixture
def folder():
    """Yield a folder in /tmp, because the paths of Ray's sockets may have at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_cluster_grows_for_embed_shrinks_and_grows_again(folder, ray_cluster):
    images, _ = digit_images(400)
    (folder / "pool").mkdir()
    for number, image in enumerate(images):
        (folder / "pool" / f"{number:03d}.png").write_bytes(png(image))
    overrides = [
        *(f"pool.uri={folder / 'pool'}", "budget=0.25", "embed.encoder=pixels", "embed.image_size=8"),
        *("embed.proxy_image_size=8", "embed.block_images=64", "cluster.method=kmeans", "cluster.num_clusters=10"),
        *("train.network=small_cnn", "train.epochs=3", "train.batch_size=32", "train.augmentation=crop"),
        *(
            "train.crop_padding=1",
            "train.num_workers=1",
            "train.cpus_per_worker=1",
            "select.method=double_end",
            "select.hard_fraction=0.2",
        ),
        *("embed.num_workers=4", "cluster.num_workers=4"),
    ]
    script = f"ip link set lo up && exec {sys.executable} {SCRIPT} {folder} {' '.join(overrides)}"
    result = subprocess.run([*NAMESPACES, "sh", "-c", script], capture_output=True, text=True, timeout=800)
    output = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    assert output[0].endswith("0 CPUs and 0 GPUs in the Ray cluster now")
    (refused,) = (line for line in output if line.startswith("refused "))
    assert "there is no CPU in the Ray cluster now: give embed.num_workers=" in refused
    waits = (
        "embed     will wait for nodes: embed.num_workers requests 4 encoders of 1 CPU: 4 CPUs in all, and there are 0"
    )
    assert waits in result.stderr

    before, after = output[: output.index("embedded")], output[output.index("embedded") : output.index("finished")]
    has_grown = {"workers 1", "workers 2"}.intersection
    assert before[1] == "workers 0" and has_grown(before)
    assert "workers 0" in after and has_grown(after)
    assert output[-1] == "workers 0"

    run(load_config(preset("cifar10"), [*overrides, f"run_dir={folder / 'local'}"]))
    assert contents(folder / "run", *TABLES) == contents(folder / "local", *TABLES)
