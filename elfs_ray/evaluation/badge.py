"""BADGE as a baseline: labels are bought round by round, and a network is trained from scratch on those bought so far.

Reads   proxy_images/, the true labels of what was bought
Writes  <folder>/round-0000.parquet, ... (sample_id, in the order of buying), one a round, so that none is repeated

Every round embeds the whole pool: the task holds its images, 3 · s² bytes a sample for s pixels, and the factors of its
gradients, 4 · (d + 2 classes) bytes a sample (methods/selection/badge.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray
import torch

from elfs_ray.evaluation.data import TrueLabels
from elfs_ray.evaluation.trials import TrialPlace
from elfs_ray.methods.selection.badge import badge_selection
from elfs_ray.methods.selection.pruning import random_selection
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.runtime.cluster import get_result, remote_progress
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.training.classifier_inputs import load_proxy_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class BadgeJob:
    """Hold what decides which samples are bought: pool (ascending ids), how many by the end of each round, seed."""

    run_dir: RunDir
    image_size: int
    sample_ids: np.ndarray
    round_ends: tuple[int, ...]
    settings: ClassifierSettings
    seed: int


def round_ends(counts: Sequence[int], num_rounds: int) -> tuple[int, ...]:
    """Return how many samples are bought by each round's end: equal rounds from each budget to the next larger one."""
    ends = [
        start + (end - start) * (number + 1) // num_rounds
        for start, end in pairwise([0, *sorted(set(counts))])
        for number in range(num_rounds)
    ]
    return tuple(sorted(set(ends) - {0}))


def buy_labels(job: BadgeJob, labels: TrueLabels, folder: str, place: TrialPlace) -> np.ndarray:
    """Return the samples in the order of buying, (last round's end,) int64; the first n are those of a budget of n."""
    buy = ray.remote(num_cpus=place.num_cpus_each, num_gpus=place.num_gpus_each, max_retries=3)(_buy)
    with Progress("badge", len(job.round_ends), "rounds") as progress, remote_progress(progress) as board:
        return get_result(buy.remote(job, [ray.put(labels)], folder, place, board))


def _buy(
    job: BadgeJob, labels: list[ray.ObjectRef], folder: str, place: TrialPlace, board: ray.ObjectRef
) -> np.ndarray:
    torch.set_num_threads(place.num_cpus_each)
    true_labels: TrueLabels = ray.get(labels[0])
    bought = np.empty(0, np.int64)
    images = None
    for number, end in enumerate(job.round_ends):
        path = filesystem.join(folder, f"round-{number:04d}.parquet")
        if filesystem.exists(path):
            new = filesystem.read_table(path)[schema.SAMPLE_ID].to_numpy()
        else:
            if images is None:
                images = load_proxy_images(job.run_dir, job.sample_ids, job.image_size)
            new = _next_round(job, images, true_labels, bought, end - len(bought), number, place.device)
            filesystem.write_table(path, pa.table({schema.SAMPLE_ID: new}))
        bought = np.concatenate([bought, new])
        board.write.remote(number + 1, "")  # type: ignore[attr-defined]
    return bought


def _next_round(
    job: BadgeJob,
    images: np.ndarray,
    labels: TrueLabels,
    bought: np.ndarray,
    count: int,
    number: int,
    device: str,
) -> np.ndarray:
    """Return the ids to buy next, at random in the first round; only the labels of what was bought are looked at."""
    if not len(bought):
        return job.sample_ids[random_selection(job.sample_ids, count, job.seed)]
    chosen = np.sort(bought)
    positions = np.searchsorted(job.sample_ids, chosen)
    train = LabelledImages(images[positions], labels.of(chosen), chosen)
    training = Classifier(labels.num_classes, job.settings, seed=job.seed + number, device=device)
    for _ in training.steps(train):
        pass
    left = np.ones(len(job.sample_ids), bool)
    left[positions] = False
    features, probs = training.features_and_probs(images[left])
    picked = badge_selection(features, probs, count, job.seed + number)
    return job.sample_ids[left][picked]
