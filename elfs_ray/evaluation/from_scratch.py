"""Train a network from scratch on a selection with its true labels, and test it.

Reads   proxy_images/ of the run
Writes  the state of a training that goes on, next to the result of its trial

A killed training resumes from a state that is at most a minute old, with the same result as if it had not been killed.
"""

import io
import time
from dataclasses import dataclass

import torch

from elfs_ray.evaluation.trials import Trial, TrialPlace
from elfs_ray.evaluation.true_labels import TrueLabels, digest, load_images
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class FromScratch:
    """Trains networks: the run with the pool's images, the labels, the test images and the settings."""

    run_dir: RunDir
    image_size: int
    labels: TrueLabels
    test: LabelledImages
    settings: ClassifierSettings

    depends_on_seed = True

    def identity(self) -> str:
        """Return a hash of everything that decides a result, beside the trial and its labels."""
        return digest(
            self.run_dir.identity("index"),
            self.run_dir.identity("embed"),
            self.image_size,
            self.test.images,
            self.test.labels,
            self.settings.deciding(),
        )

    def accuracies(self, trial: Trial, state_path: str, place: TrialPlace) -> list[float]:
        """Train once; return the accuracies of the tests during the training, the last one at its end."""
        num_classes = max(int(self.test.labels.max()) + 1, self.labels.num_classes)
        images = load_images(self.run_dir, trial.sample_ids, self.image_size)
        samples = LabelledImages(images, self.labels.of(trial.sample_ids), trial.sample_ids)
        training = Classifier(num_classes, self.settings, seed=trial.seed, device=place.device)
        return train_in_parts(training, samples, self.test, state_path)


def train_in_parts(
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
