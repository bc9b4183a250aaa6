"""Training from scratch on a coreset with true labels, and testing (ELFS Section 5.1).

Every coreset is trained for the same number of iterations, whatever its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.augmentation import normalize, random_crop_flip
from elfs_ray.methods.dynamics import epoch_order
from elfs_ray.methods.hashing import hash_uint64
from elfs_ray.methods.proxy_models import build_proxy_model
from elfs_ray.methods.sgd_training import (
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


@dataclass(frozen=True)
class EvaluationSettings:
    """How every coreset is trained: `iterations` steps of `batch_size`, SGD with a cosine to `min_lr`."""

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


@dataclass(frozen=True)
class LabelledImages:
    """images (n, s, s, 3) uint8, labels (n,) integers, sample_ids (n,) that random choices are functions of."""

    images: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray


def train_and_test(
    train: LabelledImages,
    test: LabelledImages,
    num_classes: int,
    settings: EvaluationSettings,
    *,
    seed: int,
    device: str = "cpu",
) -> list[float]:
    """Train from scratch on `train`; the accuracies on `test` after each of `num_tests` equal parts of the iterations.

    The last one is the accuracy at the end; the paper reports the best. A function of the seed on one device and
    thread count. Raises FloatingPointError when the loss is not finite.
    """
    place = torch.device(device)
    torch.manual_seed(int(hash_uint64(seed, _INIT_STREAM)) >> 1)
    model = build_proxy_model(settings.network, num_classes).to(place)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(
        model,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    scaler = make_grad_scaler(settings.precision, place)
    monitor = LossMonitor()
    images = torch.from_numpy(np.ascontiguousarray(train.images)).to(place)
    labels = torch.from_numpy(train.labels.astype(np.int64)).to(place)
    tests_after = {round(settings.iterations * (i + 1) / settings.num_tests) for i in range(settings.num_tests)}
    accuracies = []
    for step, (epoch, rows) in enumerate(_batches(len(labels), settings.batch_size, settings.iterations, seed)):
        model.train()
        lr = cosine_lr(step, settings.iterations, settings.lr, settings.min_lr)
        set_learning_rate(optimizer, lr)
        chosen = torch.from_numpy(rows).to(place)
        batch = random_crop_flip(
            images[chosen],
            train.sample_ids[rows],
            seed=seed,
            epoch=epoch,
            padding=settings.crop_padding,
            flip=settings.flip,
        )
        _, loss = forward_backward(
            model,
            normalize(batch, settings.mean, settings.std),
            labels[chosen],
            torch.ones(len(rows), dtype=torch.bool, device=place),
            num_real=len(rows),
            is_last=True,
            scaler=scaler,
            precision=settings.precision,
        )
        update(optimizer, scaler)
        monitor.add(loss, num_real=len(rows), epoch=epoch, step=step, lr=lr)
        if step + 1 in tests_after:
            accuracies.append(_test(model, test, settings, place))
    monitor.finish()
    return accuracies


def _batches(num_samples: int, batch_size: int, iterations: int, seed: int):
    """(epoch, rows) of each iteration: whole shuffled epochs one after another, tails dropped, small sets whole."""
    size = min(batch_size, num_samples)
    per_epoch = num_samples // size
    for step in range(iterations):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = epoch_order(num_samples, seed, epoch)
        yield epoch, order[position * size : (position + 1) * size]


@torch.inference_mode()
def _test(model: torch.nn.Module, test: LabelledImages, settings: EvaluationSettings, place: torch.device) -> float:
    model.eval()
    num_right = 0
    for start in range(0, len(test.labels), _TEST_BATCH):
        images = torch.from_numpy(test.images[start : start + _TEST_BATCH]).to(place)
        logits = model(normalize(images, settings.mean, settings.std))
        labels = torch.from_numpy(test.labels[start : start + _TEST_BATCH].astype(np.int64)).to(place)
        num_right += int((logits.argmax(1) == labels).sum())
    return num_right / len(test.labels)
