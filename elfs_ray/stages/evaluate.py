"""evaluate: is the coreset good? Trained from scratch with true labels, beside random samples of the same number.

A run of several budgets has elfs and random for the first, elfs-<budget> and random-<budget> for the others. The
pseudo-labels are compared with the true ones, too, and the embeddings by how often a sample's nearest neighbours have
its class.

Reads   every coreset of the run, embeddings/, index/ (the labels: the only stage that reads them),
        clusters/pseudo_labels, proxy_images/, the test pool
Writes  evaluate/trials/ (one file a training, so that a resumed run repeats none), evaluate/results.parquet
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from elfs_ray.config import Config
from elfs_ray.methods.clustering_metrics import (
    adjusted_rand_index,
    contingency_table,
    matched_accuracy,
    normalized_mutual_information,
    purity,
)
from elfs_ray.methods.evaluation import EvaluationSettings, LabelledImages, train_and_test
from elfs_ray.methods.hashing import hash_uint64
from elfs_ray.methods.neighbors import nearest_neighbors
from elfs_ray.methods.pruning import random_selection
from elfs_ray.progress import Progress
from elfs_ray.ray_runtime import resolve_device, run_tasks
from elfs_ray.stages.pool_training import kept_or_computed, load_proxy_images, training_settings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.images import BadImage, decode_image, decode_proxy_image, encode_proxy_image
from elfs_ray.storage.pool import PoolColumns, find_units, list_unit, read_images
from elfs_ray.storage.run_dir import RunDir

CORESET, RANDOM = "elfs", "random"
NUM_NEIGHBORS = 10
MAX_QUERIES = 10_000  # whose error is then below 0.5%, as a standard deviation
QUERIES_PER_TASK = 1024
_QUERY_STREAM = 0x6B6E6E


def run_evaluate(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Train on each selection with each seed. Returns, for each selection, mean and spread of the test accuracies.

    The spread is the sample standard deviation over seeds. "clustering" holds what the pseudo-labels are worth, "knn"
    what the embeddings are.
    Driver memory: the test images, and 40 bytes a sample of the pool. Raises ValueError for samples or test images
    without label.
    """
    test = _load_test_pool(config, run_dir)
    num_classes = int(test.labels.max()) + 1
    embedded = run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    test_reference = ray.put(test)
    trials = []
    for table in schema.coreset_tables(config.budget):
        coreset = run_dir.read_column(table, column=schema.SAMPLE_ID)
        suffix = table.removeprefix(schema.CORESET)
        for seed in range(config.evaluate.num_seeds):
            drawn = embedded[random_selection(embedded, len(coreset), config.seed + seed)]
            trials += [(CORESET + suffix, seed, np.sort(coreset)), (RANDOM + suffix, seed, np.sort(drawn))]
    tasks = [
        (config, run_dir, selection, seed, sample_ids, [test_reference], num_classes)
        for selection, seed, sample_ids in trials
    ]
    rows: list[dict[str, Any]] = [{} for _ in tasks]
    with Progress("evaluate", len(tasks), "trainings") as progress:
        for position, row in run_tasks(_run_trial, tasks):
            rows[position] = row
            progress.advance(1)
    table = pa.Table.from_pylist(rows, schema=schema.RESULTS_SCHEMA)
    filesystem.write_table(run_dir.path("evaluate", schema.RESULTS_FILE), table)
    return {
        "rows": len(rows),
        "test_images": len(test.labels),
        "clustering": _judge_clustering(run_dir),
        "knn": neighbor_accuracy(config, run_dir),
        "selections": _summarize(rows),
    }


def format_results(figures: dict[str, Any]) -> str:
    """The table of a complete evaluation, for a person."""
    lines = [f"{'selection':<10} {'images':>8}   {'test accuracy':<16} {'best':<8} seeds"]
    for name, result in figures["selections"].items():
        spread = f" ± {result['spread']:.1%}" if result["seeds"] > 1 else ""
        accuracy = f"{result['mean']:.1%}{spread}"
        lines.append(
            f"{name:<10} {result['num_samples']:>8,}   {accuracy:<16} {result['best_mean']:<8.1%} {result['seeds']}"
        )
    clustering = figures["clustering"]
    lines.append(
        f"pseudo-labels: {clustering['accuracy']:.1%} right when clusters and classes are matched one to one, purity "
        f"{clustering['purity']:.1%}, NMI {clustering['nmi']:.3f}, ARI {clustering['ari']:.3f} "
        f"({clustering['num_clusters']} clusters, {clustering['num_classes']} classes)"
    )
    knn = figures["knn"]
    lines.append(
        f"embeddings: {knn['accuracy']:.1%} of {knn['queries']:,} samples have the class that most of their "
        f"{knn['num_neighbors']} nearest neighbours have"
    )
    return "\n".join(lines)


def _judge_clustering(run_dir: RunDir) -> dict[str, float]:
    """The pseudo-labels beside the true labels of the samples that have one."""
    sample_ids, clusters = (
        run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=column)
        for column in (schema.SAMPLE_ID, schema.PSEUDO_LABEL)
    )
    labels = run_dir.read_rows(schema.INDEX, sample_ids, [schema.LABEL])[schema.LABEL]
    known = labels.is_valid().to_numpy()
    classes, truth = np.unique(labels.drop_null().to_numpy(), return_inverse=True)
    num_clusters = int(run_dir.figures("cluster")["num_clusters"])
    table = contingency_table(clusters[known], truth, num_clusters, len(classes))
    return {
        "num_clusters": num_clusters,
        "num_classes": len(classes),
        "accuracy": matched_accuracy(table),
        "purity": purity(table),
        "nmi": normalized_mutual_information(table),
        "ari": adjusted_rand_index(table),
    }


def neighbor_accuracy(config: Config, run_dir: RunDir) -> dict[str, float]:
    """How often the 10 nearest neighbours by cosine, itself excluded, vote for a sample's class (ties: the lowest).

    Of the samples that have a label; of more than 10,000 a random 10,000 are asked. Costs 2·n·d operations each.
    Returns accuracy, num_neighbors, queries. Driver memory: 20 bytes a sample. Raises ValueError where fewer than two
    samples have a label.
    """
    embedded = run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    labels = run_dir.read_rows(schema.INDEX, embedded, [schema.LABEL])[schema.LABEL]
    known = labels.is_valid().to_numpy()
    sample_ids, classes = embedded[known], labels.drop_null().to_numpy()
    if len(sample_ids) < 2:
        raise ValueError(f"{len(sample_ids)} samples have a label: at least 2 are needed, check pool.label")
    queries = np.sort(np.argsort(hash_uint64(config.seed, _QUERY_STREAM, sample_ids), kind="stable")[:MAX_QUERIES])
    labelled = ray.put((sample_ids, classes))
    device = resolve_device(config.cluster.device, "cluster.device")
    tasks = [
        (run_dir, [labelled], queries[start : start + QUERIES_PER_TASK], device)
        for start in range(0, len(queries), QUERIES_PER_TASK)
    ]
    with Progress("evaluate", len(queries), "neighbourhoods") as progress:
        num_right = 0
        for position, own_right in run_tasks(_vote, tasks, num_gpus_each=1 if device == "cuda" else 0):
            num_right += own_right
            progress.advance(len(tasks[position][2]))
    return {
        "accuracy": num_right / len(queries),
        "num_neighbors": min(NUM_NEIGHBORS, len(sample_ids) - 1),
        "queries": len(queries),
    }


def _vote(run_dir: RunDir, labelled: list[ray.ObjectRef], queries: np.ndarray, device: str) -> int:
    """How many of some samples (positions among the labelled ones) have the class of most of their neighbours."""
    torch.set_num_threads(1)
    sample_ids, classes = ray.get(labelled[0])
    numbers = np.unique(classes, return_inverse=True)[1]
    rows = run_dir.read_rows(schema.EMBEDDINGS, sample_ids[queries], [schema.EMBEDDING])
    found = nearest_neighbors(
        schema.matrix_of(rows, schema.EMBEDDING),
        sample_ids[queries],
        _labelled_shards(run_dir, sample_ids),
        min(NUM_NEIGHBORS, len(sample_ids) - 1),
        device=device,
    )
    votes = numbers[np.searchsorted(sample_ids, found.neighbor_ids)]
    counts = np.zeros((len(queries), numbers.max() + 1), np.int64)
    np.add.at(counts, (np.arange(len(queries))[:, None], votes), 1)
    return int((counts.argmax(1) == numbers[queries]).sum())


def _labelled_shards(run_dir: RunDir, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The embeddings of some samples (ascending ids), file by file."""
    for rows in run_dir.read_table(schema.EMBEDDINGS):
        ids = rows[schema.SAMPLE_ID].to_numpy()
        own = np.isin(ids, sample_ids, assume_unique=True)
        yield schema.matrix_of(rows, schema.EMBEDDING)[own], ids[own]


def _run_trial(
    config: Config,
    run_dir: RunDir,
    selection: str,
    seed: int,
    sample_ids: np.ndarray,
    test: list[ray.ObjectRef],
    num_classes: int,
) -> dict[str, Any]:
    """One training, unless an earlier run has its result."""
    torch.set_num_threads(1)

    def train() -> dict[str, Any]:
        accuracies = train_and_test(
            _load_samples(config, run_dir, sample_ids), ray.get(test[0]), num_classes, _settings(config), seed=seed
        )
        return {
            "selection": selection,
            "seed": seed,
            "num_samples": len(sample_ids),
            "last_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
        }

    return kept_or_computed(run_dir.path("evaluate", "trials", f"{selection}-seed{seed}.json"), train)


def _settings(config: Config) -> EvaluationSettings:
    own = config.evaluate
    return training_settings(
        config.train, network=own.network, iterations=own.iterations, batch_size=own.batch_size, lr=own.lr
    )


def _load_samples(config: Config, run_dir: RunDir, sample_ids: np.ndarray) -> LabelledImages:
    rows = run_dir.read_rows(schema.INDEX, sample_ids, [schema.LABEL])
    if rows[schema.LABEL].null_count:
        raise ValueError(f"{rows[schema.LABEL].null_count} samples of the pool have no label: check pool.label")
    images = load_proxy_images(run_dir, sample_ids, config.embed.proxy_image_size)
    return LabelledImages(images, rows[schema.LABEL].to_numpy(), sample_ids)


def _load_test_pool(config: Config, run_dir: RunDir) -> LabelledImages:
    """The test images, brought to the proxy's resolution as the pool's were."""
    assert config.evaluate.test_uri is not None
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    units = find_units(config.evaluate.test_uri, config.pool.format)
    listed = pa.concat_tables([list_unit(unit, columns) for unit in units])
    size = config.embed.proxy_image_size
    images = []
    for uri, data in zip(
        listed[schema.URI].to_pylist(), read_images(listed[schema.URI].to_pylist(), columns), strict=True
    ):
        if isinstance(data, BadImage):
            raise ValueError(f"test image {uri}: {data}")
        image = decode_image(data, max_pixels=config.embed.max_image_pixels, min_size=size)
        proxy = encode_proxy_image(image, short_side=size, jpeg_quality=config.embed.proxy_jpeg_quality)
        images.append(decode_proxy_image(proxy, size))
    labels = listed[schema.LABEL]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} images of {config.evaluate.test_uri} have no label: check pool.label")
    return LabelledImages(np.stack(images), _numbers(labels, run_dir), np.arange(len(images)))


def _numbers(labels: pa.ChunkedArray, run_dir: RunDir) -> np.ndarray:
    """Labels as the index numbers them: folder names by their place in the pool's sorted names."""
    if not pa.types.is_string(labels.type):
        return labels.to_numpy()
    names = {name: number for number, name in enumerate(run_dir.figures("index")["label_names"])}
    unknown = sorted(set(labels.to_pylist()) - set(names))
    if unknown:
        raise ValueError(f"the test images have classes that the pool has not: {', '.join(unknown[:5])}")
    return np.array([names[name] for name in labels.to_pylist()])


def _summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    summary = {}
    for selection in dict.fromkeys(row["selection"] for row in rows):
        own = [row for row in rows if row["selection"] == selection]
        last = np.array([row["last_accuracy"] for row in own])
        summary[selection] = {
            "num_samples": own[0]["num_samples"],
            "mean": float(last.mean()),
            "spread": float(last.std(ddof=1)) if len(last) > 1 else 0.0,
            "best_mean": float(np.mean([row["best_accuracy"] for row in own])),
            "seeds": len(own),
        }
    return summary
