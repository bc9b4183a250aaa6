"""Measure how well a threshold of similarity separates copies of images from other images, and the search for them.

    python benchmarks/duplicates.py --data FOLDER [--only imagenette,cifar10]
    python benchmarks/duplicates.py [--quick] --million

FOLDER has imagenette/ (WebDataset tars: jpg, cls) and cifar10/train.parquet (image). Of 400 of 2,944 and 250 of 3,000
images, copies are made: saved as JPEG at a lower quality, cropped, shifted, resized, flipped. One line of JSON for each
set and threshold: the share of the copies at least as similar to their original (recall), the share of the originals
with another one so similar (some of these are real near-duplicates), and precision: the share of right ones among all
pairs above the threshold, where every pair of two originals counts as wrong. --million measures stages neighbors and
duplicates on a million made-up points, of which a tenth are near copies of others. --quick takes 20,000 points.
"""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from helpers.pools import read_set
from helpers.reporting import command_line, emit
from kmeans import DIM, unit, write_embeddings
from PIL import Image
from selection import Peak, memory_of_ray

from elfs_ray.config import load_config
from elfs_ray.methods.encoders.encoder import load_encoder, to_unit_float16
from elfs_ray.pool.images import resize_center_crop
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.duplicates.run import run_duplicates
from elfs_ray.stages.neighbors.run import run_neighbors
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

ENCODER = "efficientnet_lite0"
THRESHOLDS = (0.85, 0.88, 0.9, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
THRESHOLD = 0.93
TARGET_S, TARGET_GIB = 1800.0, 8.0  # for a million samples
SETS = {"imagenette": (2_944, 400), "cifar10": (3_000, 250)}  # images, and how many of them are copied
_BATCH = 64

Distortion = Callable[[Image.Image, np.random.Generator], Image.Image]


def saved_as_jpeg(quality: int) -> Distortion:
    """Return a distortion that saves an image as a JPEG of this quality."""

    def save(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return save


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out a random rectangle of 90% of each side."""
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def shift(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Move an image by 5% of its sides to the right and down, and repeat its edge."""
    pixels = np.asarray(image)
    down, right = round(0.05 * image.height), round(0.05 * image.width)
    padded = np.pad(pixels, ((down, 0), (right, 0), (0, 0)), mode="edge")
    return Image.fromarray(padded[: image.height, : image.width])


def halve(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


DISTORTIONS: dict[str, Distortion] = {
    **{f"jpeg_{quality}": saved_as_jpeg(quality) for quality in (95, 75, 50, 30)},
    "crop_90": crop,
    "shift_5": shift,
    "half_size": halve,
    "flip": flip,
}


def embed(images: list[Image.Image]) -> np.ndarray:
    """Return unit embeddings (n, d) float16, made as a run makes them."""
    encoder = load_encoder(ENCODER)
    shape = encoder.input
    features = []
    for start in range(0, len(images), _BATCH):
        pixels = [
            resize_center_crop(image, resize=shape.resize, crop=shape.crop, interpolation=shape.interpolation)
            for image in images[start : start + _BATCH]
        ]
        features.append(encoder.encode(np.stack(pixels)))
    return to_unit_float16(np.concatenate(features))[0]


def embed_copies(images: list[Image.Image], num_copied: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the embeddings (n, d) of images and, for each distortion, of copies of the first (c, d)."""
    originals = images[:num_copied]
    copies = {
        name: embed([distort(image, np.random.default_rng(number)) for number, image in enumerate(originals)])
        for name, distort in DISTORTIONS.items()
    }
    return embed(images), copies


def report(name: str, embeddings: np.ndarray, copies: Mapping[str, np.ndarray]) -> None:
    """Print the recall of copies and the other images above each threshold."""
    rows = embeddings.astype(np.float32)
    similarity = np.triu(rows @ rows.T, 1)
    of_copies = {kind: (rows[: len(made)] * made).sum(1) for kind, made in copies.items()}
    nearest = np.maximum(similarity.max(0), similarity.max(1))
    for threshold in THRESHOLDS:
        right = sum(int((values >= threshold).sum()) for values in of_copies.values())
        others = int((similarity >= threshold).sum())
        line = {
            "set": name,
            "threshold": threshold,
            "recall": {kind: round(float((values >= threshold).mean()), 3) for kind, values in of_copies.items()},
            "others_so_similar": round(float((nearest >= threshold).mean()), 4),
            "pairs_of_others": others,
            "precision": round(right / max(right + others, 1), 4),
        }
        print(json.dumps(line), flush=True)


def write_pool(run_dir: RunDir, num_samples: int) -> None:
    """Write made-up embeddings, of which the last 10% are near copies of others, with a similarity of about 0.97."""
    write_embeddings(run_dir, num_samples)
    files = run_dir.counted_files(schema.EMBEDDINGS)
    num_copied = num_samples // 10
    firsts = [schema.parse_range_file(path)[0] for path, _ in files]
    originals = np.concatenate(
        [embeddings_of(path) for (path, _), first in zip(files, firsts, strict=True) if first < num_copied]
    )[:num_copied]
    rng = np.random.default_rng(0)
    copies = originals + 0.25 / DIM**0.5 * rng.standard_normal(originals.shape, dtype=np.float32)
    for (path, rows), first in zip(files, firsts, strict=True):
        ids = np.arange(first, first + rows)
        start = num_samples - num_copied
        if ids[-1] >= start:
            embeddings = embeddings_of(path)
            embeddings[ids >= start] = unit(copies[ids[ids >= start] - start])
            columns = [ids, schema.matrix_column(embeddings)]
            filesystem.write_table(path, pa.table(columns, schema=schema.embeddings_schema(DIM)))


def embeddings_of(path: str) -> np.ndarray:
    return schema.matrix_of(filesystem.read_table(path), schema.EMBEDDING).copy()


def measure_pool(num_samples: int) -> None:
    """Measure stages neighbors and duplicates on a pool of made-up points, with two CPUs."""
    connect("local", num_cpus=2, object_store_memory=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        write_pool(run_dir, num_samples)
        required = ["pool.uri=/made/up", "budget=0.1", "cluster.num_clusters=2", f"run_dir={folder}"]
        config = load_config(None, [*required, f"duplicates.threshold={THRESHOLD}"])
        idle = memory_of_ray()
        with Peak(memory_of_ray) as search:
            neighbors = run_neighbors(config, run_dir)
        with Peak(memory_of_ray) as grouping:
            result = run_duplicates(config, run_dir)
        ids = run_dir.read_column(schema.DUPLICATES, column=schema.SAMPLE_ID)
    planted = num_samples // 10
    recall = np.isin(np.arange(num_samples - planted, num_samples), ids).mean()
    title = f"near-duplicates of {num_samples:,} x {DIM}"
    scale = num_samples / 1_000_000
    seconds = search.seconds + grouping.seconds
    emit(title, seconds, "s", "target for a million", TARGET_S * scale, less_is_better=True)
    emit(f"{title}: groups, once neighbours are known", grouping.seconds, "s", "all", seconds, less_is_better=True)
    gib = (max(search.peak_bytes, grouping.peak_bytes) - idle) / 2**30
    emit(f"memory: {title}", gib, "GiB", "target for a million", TARGET_GIB, less_is_better=True)
    emit(f"{title}: share of the planted ones", float(recall), "share", "all", 1.0)
    print(neighbors, result.rows, flush=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--only", default=",".join(SETS), help="sets to measure, separated by commas")
    parser.add_argument("--million", action="store_true", help="measure the search on a million made-up points")
    parser.add_argument("--samples", type=int, default=1_000_000, help="points of --million")
    parser.add_argument("--quick", action="store_true", help="20,000 made-up points; under 45 s on 2 cores")
    arguments = parser.parse_args()
    if arguments.million or arguments.quick:
        measure_pool(20_000 if arguments.quick else arguments.samples)
        return
    if arguments.data is None:
        parser.error("give --data, a folder with the data sets, or --million or --quick")
    for name in arguments.only.split(","):
        (images, _), _ = read_set(arguments.data / name)
        num_images, num_copied = SETS[name]
        decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in images[:num_images]]
        report(name, *embed_copies(decoded, num_copied))


if __name__ == "__main__":
    main()
