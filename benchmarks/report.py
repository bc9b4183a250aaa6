"""Write the report of a run of a million images: seconds, bytes of the page, and memory.

    python benchmarks/report.py [--folder FOLDER] [--num-images N]
    python benchmarks/report.py --quick

The tables are written directly: embeddings of 384 dimensions in 1,000 clusters, copies of 66 pixels of crops from two
photographs that come with scikit-learn, and a coreset of a tenth of the pool, as stage select would leave them. The
references are what the page promises: a minute and 5 MB.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from helpers.reporting import command_line, emit, peak_bytes
from PIL import Image
from sklearn.datasets import load_sample_images

from elfs_ray.config import Config, load_config
from elfs_ray.pool.images import encode_proxy_image
from elfs_ray.runtime.progress import say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.embed.blocks import write_proxy_images
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.report.run import run_report
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.stage import Result
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

DIM, NUM_CLUSTERS, ROWS_PER_FILE, COPY_SIZE, NUM_COPIES = 384, 1000, 8192, 66, 500
MAX_SECONDS, MAX_BYTES = 60.0, 5_000_000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 images, under 45 s on 2 cores")
    parser.add_argument("--folder", type=Path, help="where the tables are kept, 5 GB for a million images")
    parser.add_argument("--num-images", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        _measure(folder, 20_000 if arguments.quick else arguments.num_images)


def _measure(folder: Path, num_images: int) -> None:
    run_dir = RunDir(folder)
    if run_dir.success_marker(SelectResult.stage) is None:
        say(f"writing the tables of {num_images:,} images")
        _write_pool(run_dir, num_images)
        _write_coreset(run_dir, num_images)
    config = _config(folder)
    before = peak_bytes()
    start_s = time.perf_counter()
    num_bytes = run_report(config, run_dir).bytes
    seconds = time.perf_counter() - start_s
    emit("seconds", seconds, "s", "limit", MAX_SECONDS, less_is_better=True)
    emit("size of the page", num_bytes, "bytes", "limit", MAX_BYTES, less_is_better=True)
    emit("peak memory", peak_bytes(), "bytes", "before the report", before, less_is_better=True)


def _config(folder: Path) -> Config:
    keys = (f"run_dir={folder}", "pool.uri=s3://bucket/train", "budget=0.1", f"cluster.num_clusters={NUM_CLUSTERS}")
    method = ("select.method=double_end", "select.hard_fraction=0.3", "train.network=small_cnn")
    return load_config(None, [*keys, *method, "embed.encoder=pixels", f"embed.proxy_image_size={COPY_SIZE}"])


def _write_pool(run_dir: RunDir, num_images: int) -> None:
    rng = np.random.default_rng(0)
    # Few directions matter, as in embeddings of photographs.
    centroids = rng.normal(size=(NUM_CLUSTERS, DIM)) * np.linspace(3, 0.3, DIM)
    copies = _copies(rng)
    for first in range(0, num_images, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_images))
        name = schema.range_file(first, int(ids[-1]))
        labels = (ids % NUM_CLUSTERS).astype(np.int32)
        index = [ids, _uris(ids), pa.nulls(len(ids), pa.int32())]
        filesystem.write_table(run_dir.path(schema.INDEX, name), pa.table(index, schema=schema.INDEX_SCHEMA))
        vectors = centroids[labels] + rng.normal(size=(len(ids), DIM))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        embeddings = [ids, schema.matrix_column(vectors.astype(np.float16))]
        table = pa.table(embeddings, schema=schema.embeddings_schema(DIM))
        filesystem.write_table(run_dir.path(schema.EMBEDDINGS, name), table)
        table = pa.table([ids, labels, rng.random(len(ids), np.float32)], schema=schema.PSEUDO_LABELS_SCHEMA)
        filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, name), table)
        scores = pa.table({schema.SAMPLE_ID: ids, "aum": ids / num_images})
        filesystem.write_table(run_dir.path(schema.SCORES, name), scores)
        write_proxy_images(run_dir, name, ids.tolist(), [copies[i % NUM_COPIES] for i in ids])
    sizes = np.bincount(np.arange(num_images) % NUM_CLUSTERS, minlength=NUM_CLUSTERS).tolist()
    _mark(run_dir, IndexResult(num_images, 1, "folder", []))
    _mark(run_dir, EmbedResult(num_images, 0, DIM))
    _mark(run_dir, ClusterResult(num_images, NUM_CLUSTERS, "kmeans", workers=1, sizes=sizes))
    _mark(run_dir, TrainResult(num_images, 1, 1, "memory", []))


def _copies(rng: np.random.Generator) -> list[bytes]:
    """Return crops of photographs, encoded as stage embed does."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    copies = []
    for number in range(NUM_COPIES):
        left, top = int(rng.integers(0, 400)), int(rng.integers(0, 200))
        crop = photographs[number % len(photographs)].crop((left, top, left + 240, top + 200))
        copies.append(encode_proxy_image(crop, short_side=COPY_SIZE, jpeg_quality=90))
    return copies


def _uris(ids: np.ndarray) -> list[str]:
    return [f"s3://bucket/imagenet/train/n{i % NUM_CLUSTERS:08d}/n{i % NUM_CLUSTERS:08d}_{i}.JPEG" for i in ids]


def _write_coreset(run_dir: RunDir, num_images: int) -> None:
    chosen = np.sort(np.random.default_rng(1).permutation(num_images)[: num_images // 10])
    labels, scores = (chosen % NUM_CLUSTERS).astype(np.int32), (chosen / num_images).astype(np.float32)
    coreset = pa.table([chosen, _uris(chosen), labels, scores, np.arange(len(chosen))], schema=schema.CORESET_SCHEMA)
    filesystem.write_table(run_dir.path(schema.CORESET, schema.range_file(0, len(chosen) - 1)), coreset)
    result = CoresetResult(
        rows=len(chosen),
        num_hard=num_images // 3,
        num_easy=num_images - num_images // 3 - len(chosen),
        num_not_drawn=0,
        hardest_kept=float(scores[0]),
        easiest_kept=float(scores[-1]),
        score_min=0.0,
        score_max=1.0,
        kept_examples=chosen[:100].tolist(),
        hardest_examples=list(range(100)),
        easiest_examples=list(range(num_images - 100, num_images)),
        hard_fraction=0.3,
        score="aum",
        hard_side="low",
        score_table=schema.SCORES,
    )
    _mark(run_dir, SelectResult(len(chosen), num_images, {schema.CORESET: result}))


def _mark(run_dir: RunDir, result: Result) -> None:
    run_dir.mark_complete(Marker(result.stage, {}, {}, result.to_json(), seconds=1.0))


if __name__ == "__main__":
    main()
