"""Search for the hard fraction: a short training on pseudo-labels for each value of a grid (ELFS 2406.04273).

Reads   scores/, proxy_images/
Writes  select/search/<hash of the deciding keys>/<samples>-<hard fraction>.json, one for each training, so that a
        resumed run repeats none

A random share of the pool is held out. For each hard fraction, a network is trained on the coreset and its
pseudo-labels, without the held-out samples. The hard fraction with the highest accuracy on the pseudo-labels of the
held-out samples wins. The network and its settings are those of stage train.

Memory: the driver holds 12 bytes for each sample of every coreset that is tried; a training holds the decoded images of
its coreset, 3·s² bytes for s pixels; the object store holds at most 10,000 held-out images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from elfs_ray.config import Config, deciding_keys, scaled_lr
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.selection.hard_fraction import fraction_grid
from elfs_ray.methods.training.classifier import LabelledImages, train_and_test
from elfs_ray.runtime.cluster import resolve_device
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import get_result, put, run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.selection import Budget, Selection, choose
from elfs_ray.stages.training.classifier_inputs import kept_or_computed, load_proxy_images, training_settings
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import Marker, RunDir

MAX_HELD_OUT = 10_000  # the standard error of an accuracy is then below 0.5%
_HELD_OUT_STREAM = 0x686F6C64  # keeps these random numbers apart from others of the same seed


class _Samples(NamedTuple):
    """Samples with their pseudo-labels: sample_ids (n,) int64 and pseudo_labels (n,) int32."""

    sample_ids: np.ndarray
    pseudo_labels: np.ndarray


def search_hard_fractions(
    config: Config, run_dir: RunDir, pool: ScoredPool, counts: Sequence[int]
) -> list[tuple[float, dict[str, Any]]]:
    """Return, for each number of samples to keep, the most accurate hard fraction and all "trials".

    `counts` must be distinct. Ties go to the smallest hard fraction. Raises ValueError for a pool and budgets that
    leave nothing to train or test on.
    """
    budgets = [
        Budget(count, fraction)
        for count in counts
        for fraction in fraction_grid(config.select.search_step, count, pool.num_samples)
    ]
    held_out, coresets = _divide(config, pool, choose(pool, config.select, config.seed, budgets))
    smallest = min(len(coreset.sample_ids) for coreset in coresets)
    if not len(held_out.sample_ids) or smallest < 2:
        raise ValueError(
            f"select.hard_fraction=search: of {pool.num_samples} samples, {len(held_out.sample_ids)} are held out "
            f"(must be at least 1), and the smallest coreset has {smallest} of the others (must be at least 2): set "
            "select.hard_fraction to a number or auto, or give another select.search_holdout"
        )
    test = put(_load(config, run_dir, held_out))
    folder = run_dir.path("select", "search", _identity(config, run_dir))
    device = resolve_device(config.train.device, "train.device")
    # `test` is in a list because Ray replaces a bare reference by its value, and a task whose result exists needs none.
    tasks = [
        (config, run_dir, f"{folder}/{budget.num_kept}-{budget.hard_fraction:.6g}.json", coreset, [test], device)
        for budget, coreset in zip(budgets, coresets, strict=True)
    ]
    accuracies = np.zeros(len(tasks))
    with Progress("select", len(tasks), "trainings to find the hard fraction") as progress:
        for position, metrics in run_tasks(_train, tasks, num_gpus_each=1 if device == "cuda" else 0):
            accuracies[position] = metrics["accuracy"]
            progress.advance(1)
    trials: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for budget, accuracy in zip(budgets, accuracies.tolist(), strict=True):
        trials[budget.num_kept].append({"hard_fraction": budget.hard_fraction, "accuracy": accuracy})
    return [(_best(tried), {"held_out": len(held_out.sample_ids), "trials": tried}) for tried in trials.values()]


def _best(trials: Sequence[Mapping[str, float]]) -> float:
    return max(trials, key=lambda trial: (trial["accuracy"], -trial["hard_fraction"]))["hard_fraction"]


def _divide(config: Config, pool: ScoredPool, selections: Sequence[Selection]) -> tuple[_Samples, list[_Samples]]:
    """Return the held-out samples, and the other samples of each selection, by ascending id."""
    share = min(config.select.search_holdout, MAX_HELD_OUT / pool.num_samples)
    # Shares of files come in any order; sorted by their first file, the ids ascend.
    shares = sorted(pool.map_shares(_divide_files, tuple(selections), share, config.seed), key=lambda part: part[0])
    columns = zip(*(samples for _, samples in shares), strict=True)
    held_out, *coresets = (_Samples(*map(np.concatenate, zip(*pieces, strict=True))) for pieces in columns)
    return held_out, coresets


def _divide_files(
    pool: ScoredPool, files: Sequence[str], selections: Sequence[Selection], share: float, seed: int
) -> tuple[str, list[_Samples]]:
    """Return the first of some files, and [the held-out samples, then the other samples of each selection] in them."""
    pieces: list[list[_Samples]] = [[] for _ in range(len(selections) + 1)]
    for path in files:
        rows = pool.read(path)
        labels = rows.column(schema.PSEUDO_LABEL)
        is_held_out = hash_uniform(seed, _HELD_OUT_STREAM, rows.sample_ids) < share
        masks = [is_held_out, *(selection.mask(pool, rows) & ~is_held_out for selection in selections)]
        for part, mask in zip(pieces, masks, strict=True):
            part.append(_Samples(rows.sample_ids[mask], labels[mask]))
    return files[0], [_Samples(*map(np.concatenate, zip(*part, strict=True))) for part in pieces]


def _identity(config: Config, run_dir: RunDir) -> str:
    """Return a hash of all that decides an accuracy except the budget and the hard fraction, which name the file."""
    select = deciding_keys(config.select)
    keys = {f"select.{key}": select[key] for key in select if key not in ("hard_fraction", "search_step")}
    keys |= {f"train.{key}": value for key, value in deciding_keys(config.train).items()}
    inputs = {stage: run_dir.identity(stage) for stage in ("cluster", "train")}
    return Marker("search", {"seed": config.seed, **keys}, inputs, {}).identity


def _load(config: Config, run_dir: RunDir, samples: _Samples) -> LabelledImages:
    size = config.train.image_size or config.embed.proxy_image_size
    images = load_proxy_images(run_dir, samples.sample_ids, size)
    return LabelledImages(images, samples.pseudo_labels, samples.sample_ids)


def _train(
    config: Config, run_dir: RunDir, path: str, coreset: _Samples, test: list[Any], device: str
) -> dict[str, float]:
    """Train on a coreset with its pseudo-labels and return the accuracy, or read that which an earlier run wrote."""
    torch.set_num_threads(1)
    train, num_classes = config.train, ClusterResult.read(run_dir).num_clusters
    settings = training_settings(
        train,
        network=train.network,
        iterations=config.select.search_iterations,
        batch_size=train.batch_size,
        lr=scaled_lr(train),
        num_tests=1,
        precision=resolve_precision(train.precision, torch.device(device)),
    )

    def compute() -> dict[str, float]:
        images = _load(config, run_dir, coreset)
        accuracies = train_and_test(images, get_result(test[0]), num_classes, settings, seed=config.seed, device=device)
        return {"accuracy": accuracies[-1]}

    return kept_or_computed(path, compute)
