"""Trainings from scratch with true labels, side by side on the cluster's devices; each leaves a file, none is repeated.

A file is named by a hash of all that decides its result: the samples, their labels, the test images, the settings and
the seed. Selections that hold the same samples share their trainings, and another config finds its own files. A
training that is killed goes on from its last minute, exactly.
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

from elfs_ray.evaluation.data import TrueLabels, digest, load_samples
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
    """Where trainings run, and what each holds of it: a share of a GPU, or so many CPU threads."""

    device: str = "cpu"
    num_gpus_each: float = 0.0
    num_cpus_each: int = 1


@dataclass(frozen=True)
class TrialData:
    """What all trainings share: the run that has the pool's images, labels, test images; every key is in the hash."""

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
    """Train on each selection and test; return the metrics of each trial, in their order.

    They are seed, num_samples, last_accuracy, best_accuracy and accuracies. Driver memory: the test images, and what
    `data` holds. Raises ValueError for samples without label.
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
    found = _read_results(folder, distinct)
    left = [name for name in distinct if name not in found]
    references = [ray.put(data.labels), ray.put(data.test)]
    common = (data.run_dir, data.image_size, data.num_classes, references, settings, place)
    tasks = [(*common, distinct[name], filesystem.join(folder, name)) for name in left]
    with Progress("evaluate", len(distinct), "trainings", done=len(found)) as progress:
        for position, metrics in run_tasks(
            _run_trial, tasks, num_gpus_each=place.num_gpus_each, num_cpus_each=place.num_cpus_each
        ):
            found[left[position]] = metrics
            progress.advance(1)
    return [found[name] for name in names]


def _read_results(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What an earlier run has left of these trainings; the states that a kill has left beside results are dropped."""
    there = {info.base_name for info in filesystem.list_files(folder)}
    found = {}
    for name in there.intersection(names):
        found[name] = json.loads(filesystem.read_bytes(filesystem.join(folder, name)))
        if (unfinished := name.removesuffix(".json") + UNFINISHED) in there:
            filesystem.delete(filesystem.join(folder, unfinished))
    return found


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
    """One training, unless an earlier try of this task has its result."""
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
    filesystem.delete(path.removesuffix(".json") + UNFINISHED)
    return metrics


def _train_in_parts(
    training: Classifier,
    samples: LabelledImages,
    test: LabelledImages,
    path: str,
    save_every_s: float = SAVE_EVERY_S,
) -> list[float]:
    """The accuracies of a training that goes on from the file at `path` and leaves its state there now and then."""
    accuracies: list[float] = []
    if filesystem.exists(path):
        state = torch.load(io.BytesIO(filesystem.read_bytes(path)), map_location="cpu", weights_only=True)
        training.restore(state)
        accuracies = state["accuracies"]
    saved_s = time.monotonic()
    for _ in training.steps(samples):
        if training.is_test_due():
            accuracies.append(training.accuracy(test))
        if time.monotonic() - saved_s > save_every_s and training.num_steps < training.settings.iterations:
            buffer = io.BytesIO()
            torch.save({**training.state(), "accuracies": accuracies}, buffer)
            filesystem.write_bytes(path, buffer.getvalue())
            saved_s = time.monotonic()
    return accuracies


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of one selection over its seeds: of the last test, and of the best one of each training.

    A spread is the sample standard deviation over seeds, 0 for a single one.
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
