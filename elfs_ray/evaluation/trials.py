"""Learn from selections with their true labels, in parallel on the devices, and test.

Writes  <folder>/<hash>-seed<seed>.json, one per trial

What learns is a network from scratch (from_scratch.py) or a linear probe (probe.py). The hash is over everything that
decides the result: the samples, their labels, the test images and the settings. So no trial is repeated, and selections
of the same samples share their trials.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from elfs_ray.evaluation.true_labels import TrueLabels, digest
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import get_result, put, run_tasks
from elfs_ray.stages.training.classifier_inputs import kept_or_computed
from elfs_ray.storage import filesystem

UNFINISHED = ".unfinished.pt"


@dataclass(frozen=True)
class Trial:
    """The samples of a selection, ascending ids (n,) int64, and the seed of weights and batches."""

    sample_ids: np.ndarray
    seed: int


@dataclass(frozen=True)
class TrialPlace:
    """Where trials run and what each occupies: a share of a GPU, and CPUs."""

    device: str = "cpu"
    num_gpus_each: float = 0.0
    num_cpus_each: int = 1


class Learner(Protocol):
    """What learns from a selection. It holds all that trials share, and travels to the tasks once.

    depends_on_seed: False if trials of the same samples have the same result whatever their seed.
    """

    depends_on_seed: bool

    @property
    def labels(self) -> TrueLabels: ...

    def identity(self) -> str:
        """Return a hash of everything that decides a result, beside the trial and its labels."""

    def accuracies(self, trial: Trial, state_path: str, place: TrialPlace) -> list[float]:
        """Learn from the samples of the trial and return the test accuracies, the last one that of the end.

        state_path: of a file from which a killed trial may resume; it is deleted once the result is written.
        """


def run_trials(trials: Sequence[Trial], learner: Learner, folder: str, place: TrialPlace) -> list[dict[str, Any]]:
    """Learn from each selection and test; return the metrics of the trials, in their order.

    Metrics: seed, num_samples, last_accuracy, best_accuracy, accuracies. Driver memory: the learner's. Raises
    ValueError for samples without a label.
    """
    shared = learner.identity()
    names = [
        f"{digest(shared, trial.sample_ids, learner.labels.of(trial.sample_ids))}"
        f"-seed{trial.seed if learner.depends_on_seed else 0}"
        for trial in trials
    ]
    distinct = dict(zip(names, trials, strict=True))
    results = _read_results(folder, distinct)
    left = [name for name in distinct if name not in results]
    # In the object store once for all tasks. Ray fetches references that are arguments before a task starts, those in a
    # list only where the task calls `ray.get`: a task whose result exists fetches nothing.
    reference = [put(learner)]
    tasks = [(reference, distinct[name], filesystem.join(folder, name), place) for name in left]
    with Progress("evaluate", len(distinct), "trainings", done=len(results)) as progress:
        for position, metrics in run_tasks(
            _run_trial, tasks, num_gpus_each=place.num_gpus_each, num_cpus_each=place.num_cpus_each
        ):
            results[left[position]] = metrics
            progress.advance(1)
    # Trials that share a result differ in their seeds.
    return [{**results[name], "seed": trial.seed} for name, trial in zip(names, trials, strict=True)]


def _read_results(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the results of these trials that an earlier evaluation wrote, by name."""
    existing = {info.base_name for info in filesystem.list_files(folder)}
    results = {}
    for name in names:
        if f"{name}.json" not in existing:
            continue
        results[name] = json.loads(filesystem.read_bytes(filesystem.join(folder, f"{name}.json")))
        # A task that was killed after it wrote its result had no time to delete its state.
        if name + UNFINISHED in existing:
            filesystem.delete(filesystem.join(folder, name + UNFINISHED))
    return results


def _run_trial(references: list[Any], trial: Trial, path: str, place: TrialPlace) -> dict[str, Any]:
    """Learn once and return the metrics, which an earlier try of this task may have written already."""
    torch.set_num_threads(place.num_cpus_each)

    def learn() -> dict[str, Any]:
        accuracies = get_result(references[0]).accuracies(trial, path + UNFINISHED, place)
        return {
            "seed": trial.seed,
            "num_samples": len(trial.sample_ids),
            "last_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "accuracies": accuracies,
        }

    metrics = kept_or_computed(f"{path}.json", learn)
    # Only once the result is written: a kill in between must not lose both.
    filesystem.delete(path + UNFINISHED)
    return metrics


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of one selection over its seeds: of the last test, and of the best test of each training.

    A spread is the sample standard deviation over the seeds, 0 if all results are equal.
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
    # Rounding could give equal values a deviation that is not quite 0.
    return float(values.mean()), float(values.std(ddof=1)) if len(np.unique(values)) > 1 else 0.0
