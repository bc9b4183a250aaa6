"""Train from scratch on selections with their true labels, in parallel on the cluster's devices, and test.

Writes  <folder>/<hash>-seed<seed>.json, one per training

The hash is over everything that decides the result: the samples, their labels, the test images and the settings. So no
training is repeated, and selections of the same samples share their trainings. A killed training resumes from a state
that is at most a minute old, with the same result as if it had not been killed.
"""

import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from elfs_ray.evaluation.true_labels import TrueLabels, digest, load_samples
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.runtime.cluster import run_tasks
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.training.classifier_inputs import kept_or_computed
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

SAVE_EVERY_S = 60.0
UNFINISHED = ".unfinished.pt"


@dataclass(frozen=True)
class Trial:
    """One training: the samples of a selection, ascending ids (n,) int64, and the seed of weights and batches."""

    sample_ids: np.ndarray
    seed: int


@dataclass(frozen=True)
class TrialPlace:
    """Where trainings run and what each occupies: a share of a GPU, and CPUs."""

    device: str = "cpu"
    num_gpus_each: float = 0.0
    num_cpus_each: int = 1


@dataclass(frozen=True)
class TrialData:
    """What all trainings share: the run with the pool's images, the labels and the test images."""

    run_dir: RunDir
    image_size: int
    labels: TrueLabels
    test: LabelledImages

    @property
    def num_classes(self) -> int:
        return max(int(self.test.labels.max()) + 1, self.labels.num_classes)


def run_trials(
    trials: Sequence[Trial], data: TrialData, settings: ClassifierSettings, folder: str, place: TrialPlace
) -> list[dict[str, Any]]:
    """Train on each selection and test; return the metrics of the trials, in their order.

    Metrics: seed, num_samples, last_accuracy, best_accuracy, accuracies. Driver memory: `data`. Raises ValueError for
    samples without a label.
    """
    shared = digest(
        data.run_dir.identity("index"),
        data.run_dir.identity("embed"),
        data.image_size,
        data.test.images,
        data.test.labels,
        sorted(asdict(settings).items()),
    )
    names = [
        f"{digest(shared, trial.sample_ids, data.labels.of(trial.sample_ids))}-seed{trial.seed}.json"
        for trial in trials
    ]
    distinct = dict(zip(names, trials, strict=True))
    results = _read_results(folder, distinct)
    left = [name for name in distinct if name not in results]
    # In the object store once for all tasks. Ray fetches references that are arguments before a task starts, those in a
    # list only where the task calls `ray.get`: a task whose result exists fetches nothing.
    references = [ray.put(data.labels), ray.put(data.test)]
    common = (data.run_dir, data.image_size, data.num_classes, references, settings, place)
    tasks = [(*common, distinct[name], filesystem.join(folder, name)) for name in left]
    with Progress("evaluate", len(distinct), "trainings", done=len(results)) as progress:
        for position, metrics in run_tasks(
            _run_trial, tasks, num_gpus_each=place.num_gpus_each, num_cpus_each=place.num_cpus_each
        ):
            results[left[position]] = metrics
            progress.advance(1)
    return [results[name] for name in names]


def _read_results(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the results of these trainings that an earlier evaluation wrote, by name."""
    existing = {info.base_name for info in filesystem.list_files(folder)}
    results = {}
    for name in existing.intersection(names):
        results[name] = json.loads(filesystem.read_bytes(filesystem.join(folder, name)))
        # A task that was killed after it wrote its result had no time to delete its state.
        if (unfinished := name.removesuffix(".json") + UNFINISHED) in existing:
            filesystem.delete(filesystem.join(folder, unfinished))
    return results


def _run_trial(
    run_dir: RunDir,
    image_size: int,
    num_classes: int,
    references: list[ray.ObjectRef],
    settings: ClassifierSettings,
    place: TrialPlace,
    trial: Trial,
    path: str,
) -> dict[str, Any]:
    """Train once and return the metrics, which an earlier try of this task may have written already."""
    torch.set_num_threads(place.num_cpus_each)

    def train() -> dict[str, Any]:
        labels, test = ray.get(references)
        samples = load_samples(run_dir, labels, trial.sample_ids, image_size)
        training = Classifier(num_classes, settings, seed=trial.seed, device=place.device)
        accuracies = _train_in_parts(training, samples, test, path.removesuffix(".json") + UNFINISHED)
        return {
            "seed": trial.seed,
            "num_samples": len(trial.sample_ids),
            "last_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "accuracies": accuracies,
        }

    metrics = kept_or_computed(path, train)
    # Only once the result is written: a kill in between must not lose both.
    filesystem.delete(path.removesuffix(".json") + UNFINISHED)
    return metrics


def _train_in_parts(
    training: Classifier,
    samples: LabelledImages,
    test: LabelledImages,
    path: str,
    save_every_s: float = SAVE_EVERY_S,
) -> list[float]:
    """Train and return the accuracies of the tests.

    Resumes from the state at `path` if there is one, and writes it every `save_every_s` seconds.
    """
    accuracies: list[float] = []
    if filesystem.exists(path):
        # weights_only: a pickle could run code, and a shared folder may hold files of others.
        state = torch.load(io.BytesIO(filesystem.read_bytes(path)), map_location="cpu", weights_only=True)
        training.restore(state)
        accuracies = state["accuracies"]
    saved_s = time.monotonic()
    for _ in training.steps(samples):
        if training.is_test_due():
            accuracies.append(training.accuracy(test))
        # After the test, so that a state never lacks the accuracy of its step. At the end the result follows at once.
        if time.monotonic() - saved_s > save_every_s and training.num_steps < training.settings.iterations:
            buffer = io.BytesIO()
            torch.save({**training.state(), "accuracies": accuracies}, buffer)
            filesystem.write_bytes(path, buffer.getvalue())
            saved_s = time.monotonic()
    return accuracies


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of one selection over its seeds: of the last test, and of the best test of each training.

    A spread is the sample standard deviation over the seeds, 0 for a single seed.
    """

    num_samples: int
    num_seeds: int
    mean: float
    spread: float
    best_mean: float
    best_spread: float


def summarize(rows: Iterable[dict[str, Any]]) -> Accuracy:
    """Summarize the trials of one selection."""
    rows = list(rows)
    last = np.array([row["last_accuracy"] for row in rows])
    best = np.array([row["best_accuracy"] for row in rows])
    return Accuracy(rows[0]["num_samples"], len(rows), *_mean_and_spread(last), *_mean_and_spread(best))


def _mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
