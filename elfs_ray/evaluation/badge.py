"""BADGE as a baseline: buy labels in rounds, each with what was learned from the labels bought before.

Reads   proxy_images/, or embeddings/ for a linear probe; the true labels of the bought samples
Writes  <folder>/round-0000.parquet, ... (sample_id, in the order of buying): one file per round

A network is trained from scratch in every round and looks at the whole pool. The task holds the pool's images, 3 · s²
bytes a sample for s pixels, or its embeddings, and the factors of the gradients, 4 · (d + 2 · classes) bytes a sample
(methods/selection/badge.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.evaluation.trials import TrialPlace
from elfs_ray.evaluation.true_labels import TrueLabels, load_images
from elfs_ray.methods.selection.badge import badge_selection
from elfs_ray.methods.selection.pruning import random_selection
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.methods.training.linear_probe import fit_linear_probe
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.runtime.tasks import get_result, put, run_tasks
from elfs_ray.stages.training.classifier_inputs import load_embeddings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class BadgeJob:
    """Everything that decides which samples are bought.

    sample_ids: the pool, ascending (n,) int64. round_ends: the number of samples bought by the end of each round.
    settings: of the network; None for a linear probe.
    """

    run_dir: RunDir
    image_size: int
    sample_ids: np.ndarray
    round_ends: tuple[int, ...]
    settings: ClassifierSettings | None
    seed: int


def round_ends(counts: Sequence[int], num_rounds: int) -> tuple[int, ...]:
    """Return the number of samples bought by the end of each round.

    Between one budget and the next larger one lie `num_rounds` rounds of equal size.
    """
    ends: set[int] = set()
    for start, end in pairwise([0, *sorted(set(counts))]):
        ends |= {start + (end - start) * (number + 1) // num_rounds for number in range(num_rounds)}
    # Budgets closer together than the number of rounds give empty rounds; the set keeps one of each end.
    return tuple(sorted(ends - {0}))


def buy_labels(job: BadgeJob, labels: TrueLabels, folder: str, place: TrialPlace) -> np.ndarray:
    """Return the sample ids in the order of buying, (last round's end,) int64.

    The first n of them are what BADGE selects for a budget of n.
    """
    with Progress("badge", len(job.round_ends), "rounds") as progress, remote_progress(progress) as board:
        task = (job, [put(labels)], folder, place, board)
        resources = {"num_gpus_each": place.num_gpus_each, "num_cpus_each": place.num_cpus_each}
        ((_, bought),) = run_tasks(_buy, [task], **resources)
        return bought


def _buy(job: BadgeJob, labels: list[Any], folder: str, place: TrialPlace, board: Any) -> np.ndarray:
    torch.set_num_threads(place.num_cpus_each)
    true_labels: TrueLabels = get_result(labels[0])
    bought = np.empty(0, np.int64)
    inputs = None
    for number, end in enumerate(job.round_ends):
        path = filesystem.join(folder, f"round-{number:04d}.parquet")
        if filesystem.exists(path):
            new = filesystem.read_table(path)[schema.SAMPLE_ID].to_numpy()
        else:
            # Loaded late: a task that is retried after its last round was written decodes no image.
            if inputs is None:
                inputs = _load_inputs(job)
            new = _next_round(job, inputs, true_labels, bought, end - len(bought), number, place.device)
            filesystem.write_table(path, pa.table({schema.SAMPLE_ID: new}))
        bought = np.concatenate([bought, new])
        board.write.remote(number + 1, "")
    return bought


def _load_inputs(job: BadgeJob) -> np.ndarray:
    """Return the images of the pool (n, s, s, 3) uint8, or for a linear probe its embeddings (n, d) float16."""
    if job.settings is None:
        return load_embeddings(job.run_dir, job.sample_ids)
    return load_images(job.run_dir, job.sample_ids, job.image_size)


def _next_round(
    job: BadgeJob,
    inputs: np.ndarray,
    labels: TrueLabels,
    bought: np.ndarray,
    count: int,
    number: int,
    device: str,
) -> np.ndarray:
    """Return the ids to buy next, sampled uniformly in the first round.

    Looks at the labels of the bought samples only.
    """
    if not len(bought):
        return job.sample_ids[random_selection(job.sample_ids, count, job.seed)]
    chosen = np.sort(bought)
    positions = np.searchsorted(job.sample_ids, chosen)
    left = np.ones(len(job.sample_ids), bool)
    left[positions] = False
    if job.settings is None:
        probe = fit_linear_probe(inputs[positions], labels.of(chosen), labels.num_classes, device=device)
        features, probs = torch.from_numpy(inputs[left]).to(device, torch.float32), probe.probs(inputs[left])
    else:
        training = Classifier(labels.num_classes, job.settings, seed=job.seed + number, device=device)
        for _ in training.steps(LabelledImages(inputs[positions], labels.of(chosen), chosen)):  # trains as it iterates
            pass
        features, probs = training.features_and_probs(inputs[left])
    picked = badge_selection(features, probs, count, job.seed + number)
    return job.sample_ids[left][picked]
