"""Run directories with real digits, as earlier stages would leave them, for tests of a single stage."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from elfs_ray.config import Config, load_config
from elfs_ray.methods.selection.coverage import centred
from elfs_ray.pool.images import encode_png
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.stage import Result
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

ROWS_PER_FILE = 150
IMAGE_SIZE = 8
GAPS = (3, 77, 500)  # ids that were rejected


def digits_config(run_dir: Path, *overrides: str) -> Config:
    """Return a config for run directories of scikit-learn's digits, small enough for a test.

    The workers are few, because each is a new process, which imports torch for seconds before it works.
    """
    return load_config(
        None,
        [
            f"run_dir={run_dir}",
            "pool.uri=/no/pool",
            "budget=0.2",
            "ray_address=local",
            "embed.encoder=pixels",
            f"embed.proxy_image_size={IMAGE_SIZE}",
            "embed.num_workers=1",
            "cluster.num_clusters=10",
            "cluster.num_workers=2",
            "train.network=small_cnn",
            "train.epochs=2",
            "train.batch_size=128",
            "train.augmentation=crop",
            "train.crop_padding=1",
            "train.max_failures=0",
            "select.method=double_end",
            "select.hard_fraction=0.1",
            *overrides,
        ],
    )


def digit_images(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return real handwritten digits, (n, 8, 8) uint8, and their labels, (n,)."""
    digits = load_digits()
    return (digits.images[:num_samples] * 15.9).astype(np.uint8), digits.target[:num_samples]


def write_embedded(run_dir: RunDir, num_samples: int = 1003) -> np.ndarray:
    """Write index/, embeddings/, proxy_images/ and rejected/; return the ids that are embedded."""
    images, _ = digit_images(num_samples)
    ids = np.arange(num_samples)
    uris = [f"/digits/{i}.png" for i in ids]
    index = pa.table([ids, uris, pa.nulls(num_samples, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, num_samples - 1)), index)
    mark(run_dir, IndexResult(num_samples, 1, "folder", []))

    rejected = [{"sample_id": i, "uri": uris[i], "stage": "embed", "reason": "a test"} for i in GAPS if i < num_samples]
    table = pa.Table.from_pylist(rejected, schema=schema.REJECTED_SCHEMA)
    filesystem.write_table(run_dir.path(schema.REJECTED, schema.range_file(0, num_samples - 1)), table)

    vectors = images.reshape(num_samples, -1).astype(np.float64)
    vectors -= vectors.mean(1, keepdims=True)
    embeddings = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    for first, ids in files_of(num_samples):
        name = schema.range_file(first, min(first + ROWS_PER_FILE, num_samples) - 1)
        columns = [ids, schema.matrix_column(embeddings[ids])]
        table = pa.table(columns, schema=schema.embeddings_schema(embeddings.shape[1]))
        filesystem.write_table(run_dir.path(schema.EMBEDDINGS, name), table)
        table = pa.table([ids, [png(images[i]) for i in ids]], schema=schema.PROXY_IMAGES_SCHEMA)
        filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, name), table)
    embedded = np.concatenate([ids for _, ids in files_of(num_samples)])
    mark(run_dir, EmbedResult(len(embedded), len(rejected), embeddings.shape[1]))
    return embedded


def write_clustered(run_dir: RunDir, num_samples: int = 1003) -> np.ndarray:
    """Write what `write_embedded` does and clusters/, with the digit itself as pseudo-label; return the ids."""
    embedded = write_embedded(run_dir, num_samples)
    _, labels = digit_images(num_samples)
    for first, ids in files_of(num_samples):
        name = schema.range_file(first, min(first + ROWS_PER_FILE, num_samples) - 1)
        columns = [ids, labels[ids].astype(np.int32), np.zeros(len(ids), np.float32)]
        table = pa.table(columns, schema=schema.PSEUDO_LABELS_SCHEMA)
        filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, name), table)
    sizes = np.bincount(labels[embedded], minlength=10).tolist()
    mark(run_dir, ClusterResult(len(embedded), 10, "file", workers=1, sizes=sizes))
    return embedded


def write_trained(run_dir: RunDir, num_samples: int = 1003, num_epochs: int = 5, num_ranks: int = 3) -> dict:
    """Write what `write_clustered` does and dynamics/ of made-up probabilities; return these, (epochs, n) each."""
    ids = write_clustered(run_dir, num_samples)
    rng = np.random.default_rng(0)
    target = rng.beta(2, 1, (num_epochs, len(ids))).astype(np.float32).round(2)
    other = ((1 - target) * rng.uniform(0.5, 1, target.shape)).astype(np.float32)
    el2n = np.hypot(1 - target, other).astype(np.float32)
    for epoch in range(num_epochs):
        rank_of = rng.integers(0, num_ranks, len(ids))
        for rank in range(num_ranks):
            here = rank_of == rank
            columns = [ids[here], target[epoch, here], other[epoch, here], el2n[epoch, here]]
            path = run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch), schema.rank_file(rank, num_ranks))
            filesystem.write_table(path, pa.table(columns, schema=schema.DYNAMICS_SCHEMA))
    mark(run_dir, TrainResult(len(ids), num_epochs, num_ranks, "memory", []))
    return {"sample_id": ids, "target_prob": target, "max_other_prob": other, "el2n": el2n}


def write_selected(run_dir: RunDir, uris: Mapping[int, str] | None = None) -> np.ndarray:
    """Write what `write_trained` does, scores/ and a coreset of every tenth sample; return the ids of the latter.

    uris: those of some samples that have others than `/digits/<id>.png`.
    """
    ids = write_trained(run_dir)["sample_id"]
    names = [(uris or {}).get(i, f"/digits/{i}.png") for i in range(1003)]
    index = pa.table([np.arange(1003), names, pa.nulls(1003, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, 1002)), index)
    scores = pa.table({schema.SAMPLE_ID: ids, "aum": ids / 1003})
    filesystem.write_table(run_dir.path(schema.SCORES, schema.range_file(0, 1002)), scores)
    chosen = ids[::10]
    labels = digit_images(1003)[1][chosen].astype(np.int32)
    columns = [chosen, [names[i] for i in chosen], labels, (chosen / 1003).astype(np.float32), np.arange(len(chosen))]
    coreset = pa.table(columns, schema=schema.CORESET_SCHEMA)
    filesystem.write_table(run_dir.path(schema.CORESET, schema.range_file(0, len(chosen) - 1)), coreset)
    result = CoresetResult(
        *(len(chosen), 50, 850, 0, 0.0, 1.0, 0.0, 1.0),
        kept_examples=chosen.tolist(),
        hardest_examples=[1, 2],
        easiest_examples=[1001, 1002, 999],
        hard_fraction=0.05,
        score="aum",
        hard_side="low",
        score_table=schema.SCORES,
    )
    mark(run_dir, SelectResult(len(chosen), len(ids), {schema.CORESET: result}))
    return chosen


def write_later(run_dir: RunDir, name: str, ids: np.ndarray, **keys: object) -> None:
    """Write a coreset below coresets/, of some samples in this order, as `elfs-ray reselect` does.

    It goes beside what `write_selected` wrote. keys: keys of select by which the selection was made.
    """
    folder = RunDir(run_dir.path(schema.CORESETS_DIR, name))
    labels = digit_images(1003)[1][ids].astype(np.int32)
    uris = run_dir.read_rows(schema.INDEX, ids, [schema.URI])[schema.URI]
    columns = [ids, uris, labels, np.ones(len(ids), np.float32), np.arange(len(ids))]
    coreset = pa.table(columns, schema=schema.CORESET_SCHEMA)
    filesystem.write_table(folder.path(schema.CORESET, schema.range_file(0, len(ids) - 1)), coreset)
    result = SelectResult.read(run_dir).coresets[schema.CORESET]
    covered = {"coreset": 0.875, "random": 0.75, "classes_first": True}
    result = dataclasses.replace(result, rows=len(ids), hardest_examples=[], easiest_examples=[7], coverage=covered)
    selected = SelectResult(len(ids), 1000, {schema.CORESET: result}, left_out={"labelled": 100})
    config = {"select.method": "auto", **{f"select.{key}": value for key, value in keys.items()}}
    folder.mark_complete(Marker(SelectResult.stage, config, {}, selected.to_json(), seconds=1.0))


def files_of(num_samples: int):
    """Yield (first id, embedded ids) of each file."""
    for first in range(0, num_samples, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_samples))
        yield first, ids[~np.isin(ids, GAPS)]


def embeddings_of(run_dir: RunDir) -> np.ndarray:
    """Return all embeddings of a run, (n, d), by ascending sample_id."""
    return np.concatenate(
        [schema.matrix_of(table, schema.EMBEDDING) for table in run_dir.read_table(schema.EMBEDDINGS)]
    )


def around_mean(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings as coverage takes them: minus their mean, of unit length."""
    return centred(embeddings, embeddings.mean(axis=0, dtype=np.float64))


def mark(run_dir: RunDir, result: Result) -> None:
    """Mark a stage as complete with this result."""
    run_dir.mark_complete(Marker(result.stage, {}, {}, result.to_json(), seconds=1.0))


def png(pixels: np.ndarray) -> bytes:
    return encode_png(Image.fromarray(pixels).convert("RGB"))


def contents(folder: Path, *tables: str) -> dict[str, bytes]:
    """Return the bytes of every file of some tables, by path within the run directory; without markers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for table in tables
        for path in sorted((folder / table).rglob("*"))
        if path.is_file() and not path.name.startswith("_")
    }
