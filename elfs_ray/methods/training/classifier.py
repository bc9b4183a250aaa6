"""Train a classifier from scratch on labelled images, a coreset or a whole pool, and test it (ELFS, section 5.1).

Training takes the same number of iterations for a coreset of any size, as in the paper.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.training.augmentation import normalize, random_crop_flip
from elfs_ray.methods.training.dynamics import epoch_order
from elfs_ray.methods.training.networks import build_proxy_model, classifier_of
from elfs_ray.methods.training.sgd import (
    LossMonitor,
    Precision,
    cosine_lr,
    forward_backward,
    make_grad_scaler,
    make_optimizer,
    set_learning_rate,
    update,
)

_INIT_STREAM = 0x6576616C
_TEST_BATCH = 512
_init_lock = threading.Lock()  # all threads of a process draw initial weights from one generator


@dataclass(frozen=True)
class ClassifierSettings:
    """Hyperparameters of a classifier: `iterations` steps of `batch_size`, by SGD with a cosine to `min_lr`.

    compile: whether steps run as torch.compile makes them. A process compiles once for all its trainings of one network
    and shape of batch. Tests are not compiled.
    """

    network: str
    iterations: int
    batch_size: int
    lr: float
    min_lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    crop_padding: int
    flip: bool
    mean: Sequence[float]
    std: Sequence[float]
    num_tests: int = 10
    precision: Precision = "fp32"
    compile: bool = False

    def deciding(self) -> list[tuple[str, Any]]:
        """Return what decides a result, as (name, value) by name."""
        # Without a key that is off: results keep the names that they had before there was the key.
        return sorted((name, value) for name, value in asdict(self).items() if (name, value) != ("compile", False))


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, s, s, 3) uint8 with labels (n,) and the sample_ids (n,) that random choices depend on."""

    images: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray


class Classifier:
    """A network in training: its weights, the state of SGD, and the number of steps done.

    `state` is plain data from which `restore` resumes to the same bytes, on the same device and number of threads.
    """

    def __init__(self, num_classes: int, settings: ClassifierSettings, *, seed: int, device: str = "cpu") -> None:
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        with _init_lock:
            torch.manual_seed(int(hash_uint64(seed, _INIT_STREAM)) >> 1)  # torch's seeds are int64: drop the top bit
            self.model = build_proxy_model(settings.network, num_classes).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A wrapper beside the model, so that tests, of batches of other sizes, do not compile once more for each.
        self._network: Any = torch.compile(self.model, dynamic=False) if settings.compile else self.model
        self.optimizer = make_optimizer(
            self.model,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self.scaler = make_grad_scaler(settings.precision, self.device)
        self.num_steps = 0

    def state(self) -> dict[str, Any]:
        """Return what a later process needs to resume."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_steps": self.num_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.num_steps = state["num_steps"]

    def steps(self, train: LabelledImages) -> Iterator[int]:
        """Train on `train` for all remaining steps, and yield the number of steps done after each.

        Raises FloatingPointError where the loss is not finite.
        """
        settings, monitor = self.settings, LossMonitor()
        # As uint8 a whole set fits on a device: copied once, no step waits for it.
        images = torch.from_numpy(np.ascontiguousarray(train.images)).to(self.device)
        labels = torch.from_numpy(train.labels.astype(np.int64)).to(self.device)
        batches = _batches(len(labels), settings.batch_size, range(self.num_steps, settings.iterations), self.seed)
        for step, epoch, rows in batches:
            self.model.train()  # in every step, as the caller may have tested the network in between
            lr = cosine_lr(step, settings.iterations, settings.lr, settings.min_lr)
            set_learning_rate(self.optimizer, lr)
            chosen = torch.from_numpy(rows).to(self.device)
            batch = random_crop_flip(
                images[chosen],
                train.sample_ids[rows],
                seed=self.seed,
                epoch=epoch,
                padding=settings.crop_padding,
                flip=settings.flip,
            )
            _, loss = forward_backward(
                self._network,
                normalize(batch, settings.mean, settings.std),
                labels[chosen],
                torch.ones(len(rows), dtype=torch.bool, device=self.device),
                num_real=len(rows),
                is_last=True,
                scaler=self.scaler,
                precision=settings.precision,
            )
            update(self.optimizer, self.scaler)
            monitor.add(loss, num_real=len(rows), epoch=epoch, step=step, lr=lr)
            self.num_steps = step + 1
            if self.num_steps == settings.iterations:
                monitor.finish()  # on a GPU the last losses are still unchecked
            yield self.num_steps

    def is_test_due(self) -> bool:
        """Return True where one more of `num_tests` equal parts of the iterations is done."""
        total, parts = self.settings.iterations, self.settings.num_tests
        return self.num_steps in {round(total * (part + 1) / parts) for part in range(parts)}

    @torch.inference_mode()
    def accuracy(self, test: LabelledImages) -> float:
        """Return the share of the test images that the network labels correctly in its present state."""
        self.model.eval()
        num_right = 0
        for start in range(0, len(test.labels), _TEST_BATCH):
            images = torch.from_numpy(test.images[start : start + _TEST_BATCH]).to(self.device)
            logits = self.model(normalize(images, self.settings.mean, self.settings.std))
            labels = torch.from_numpy(test.labels[start : start + _TEST_BATCH].astype(np.int64)).to(self.device)
            num_right += int((logits.argmax(1) == labels).sum())
        return num_right / len(test.labels)

    @torch.inference_mode()
    def features_and_probs(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (n, d) and class probabilities (n, classes) of images (n, s, s, 3) uint8.

        Both are float32 on the network's device; the features are the input of the last layer.
        Memory: 4 · n · (d + classes) bytes.
        """
        self.model.eval()
        features, probs = [], []
        # The hook takes the features from the pass that computes the probabilities, instead of a second one.
        hook = classifier_of(self.model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
        for start in range(0, len(images), _TEST_BATCH):
            batch = torch.from_numpy(images[start : start + _TEST_BATCH]).to(self.device)
            logits = self.model(normalize(batch, self.settings.mean, self.settings.std))
            probs.append(torch.softmax(logits.float(), dim=1))
        hook.remove()
        return torch.cat(features), torch.cat(probs)


def train_and_test(
    train: LabelledImages,
    test: LabelledImages,
    num_classes: int,
    settings: ClassifierSettings,
    *,
    seed: int,
    device: str = "cpu",
) -> list[float]:
    """Train from scratch on `train` and return the accuracies on `test` at `num_tests` evenly spaced iterations.

    The last one is the final accuracy; the paper reports the best. The result is a function of the seed for one device
    and number of threads. Raises FloatingPointError where the loss is not finite.
    """
    training = Classifier(num_classes, settings, seed=seed, device=device)
    return [training.accuracy(test) for _ in training.steps(train) if training.is_test_due()]


def _batches(num_samples: int, batch_size: int, steps: range, seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (step, epoch, rows): shuffled epochs one after another, without the samples that do not fill a batch."""
    size = min(batch_size, num_samples)  # a set smaller than a batch is one batch
    per_epoch = num_samples // size
    order_of, order = -1, np.empty(0, np.int64)
    for step in steps:
        # The step alone decides the batch, so that training resumes in the middle of an epoch.
        epoch, position = divmod(step, per_epoch)
        if epoch != order_of:
            order_of, order = epoch, epoch_order(num_samples, seed, epoch)
        yield step, epoch, order[position * size : (position + 1) * size]
