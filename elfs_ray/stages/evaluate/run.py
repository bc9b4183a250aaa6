"""evaluate: is the coreset good? Trained from scratch with true labels, beside random samples of the same number.

A run of several budgets has elfs and random for the first, elfs-<budget> and random-<budget> for the others. The
pseudo-labels are compared with the true ones, too, and the embeddings by how often a sample's nearest neighbours have
its class.

Reads   every coreset of the run, embeddings/, index/ (the labels: no other stage reads them),
        clusters/pseudo_labels, proxy_images/, the test pool
Writes  evaluate/trials/ (one file a training, so that a resumed run repeats none), evaluate/results.parquet
"""

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.config import Config
from elfs_ray.evaluation.data import load_test_images, read_labels
from elfs_ray.evaluation.quality import judge_clustering, neighbor_accuracy
from elfs_ray.evaluation.trials import Trial, TrialData, TrialPlace, run_trials, summarize
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.selection.pruning import random_selection
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.runtime.cluster import resolve_device
from elfs_ray.stages.evaluate import EvaluateResult
from elfs_ray.stages.training.classifier_inputs import training_settings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

CORESET, RANDOM = "elfs", "random"
GPUS_EACH = 0.25  # four trainings at once on each GPU


def run_evaluate(config: Config, run_dir: RunDir) -> EvaluateResult:
    """Train on each selection with each seed. Returns, for each selection, mean and spread of the test accuracies.

    The spread is the sample standard deviation over seeds. "clustering" holds what the pseudo-labels are worth, "knn"
    what the embeddings are.
    Driver memory: the test images, and 40 bytes a sample of the pool. Raises ValueError for samples or test images
    without label.
    """
    assert config.evaluate.test_uri is not None
    selected = _selections(config, run_dir)
    labels = read_labels(run_dir)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    test = load_test_images(config.evaluate.test_uri, config.pool.format, columns, config.embed, labels.names)
    data = TrialData(run_dir, config.embed.proxy_image_size, labels, test)
    own = config.evaluate
    device = resolve_device(config.train.device, "train.device")
    settings = training_settings(
        config.train,
        network=own.network,
        iterations=own.iterations,
        batch_size=own.batch_size,
        lr=own.lr,
        precision=resolve_precision(config.train.precision, torch.device(device)),
    )
    trials = [trial for _, trial in selected]
    place = TrialPlace(device, num_gpus_each=GPUS_EACH if device == "cuda" else 0.0)
    metrics = run_trials(trials, data, settings, run_dir.path("evaluate", "trials"), place)
    rows = [{"selection": name, **found} for (name, _), found in zip(selected, metrics, strict=True)]
    columns_of = {name: [row[name] for row in rows] for name in schema.RESULTS_SCHEMA.names}
    table = pa.table(columns_of, schema=schema.RESULTS_SCHEMA)
    filesystem.write_table(run_dir.path("evaluate", schema.RESULTS_FILE), table)
    return EvaluateResult(
        rows=len(rows),
        test_images=len(test.labels),
        clustering=judge_clustering(run_dir, labels),
        knn=neighbor_accuracy(run_dir, labels, config.seed, resolve_device(config.cluster.device, "cluster.device")),
        selections={
            name: summarize(row for row in rows if row["selection"] == name)
            for name in dict.fromkeys(name for name, _ in selected)
        },
    )


def _selections(config: Config, run_dir: RunDir) -> list[tuple[str, Trial]]:
    """Every coreset and as many random samples, with each seed."""
    embedded = run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    selected = []
    for table in schema.coreset_tables(config.budgets):
        coreset = run_dir.read_column(table, column=schema.SAMPLE_ID)
        suffix = table.removeprefix(schema.CORESET)
        for seed in range(config.evaluate.num_seeds):
            drawn = embedded[random_selection(embedded, len(coreset), config.seed + seed)]
            selected.append((CORESET + suffix, Trial(np.sort(coreset), seed)))
            selected.append((RANDOM + suffix, Trial(np.sort(drawn), seed)))
    return selected


def format_results(results: EvaluateResult) -> str:
    """The table of a complete evaluation, for a person."""
    lines = [f"{'selection':<10} {'images':>8}   {'test accuracy':<16} {'best':<8} seeds"]
    for name, result in results.selections.items():
        spread = f" ± {result['spread']:.1%}" if result["seeds"] > 1 else ""
        accuracy = f"{result['mean']:.1%}{spread}"
        lines.append(
            f"{name:<10} {result['num_samples']:>8,}   {accuracy:<16} {result['best_mean']:<8.1%} {result['seeds']}"
        )
    clustering = results.clustering
    lines.append(
        f"pseudo-labels: {clustering['accuracy']:.1%} right when clusters and classes are matched one to one, purity "
        f"{clustering['purity']:.1%}, NMI {clustering['nmi']:.3f}, ARI {clustering['ari']:.3f} "
        f"({clustering['num_clusters']} clusters, {clustering['num_classes']} classes)"
    )
    knn = results.knn
    lines.append(
        f"embeddings: {knn['accuracy']:.1%} of {knn['queries']:,} samples have the class that most of their "
        f"{knn['num_neighbors']} nearest neighbours have"
    )
    return "\n".join(lines)
