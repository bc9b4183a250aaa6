"""Read the inputs of a classifier's training from a run: its settings, proxy images and saved results."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from elfs_ray.config import TrainConfig
from elfs_ray.methods.numeric.precision import Precision
from elfs_ray.methods.training.classifier import ClassifierSettings
from elfs_ray.pool.images import decode_proxy_image
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


def training_settings(
    train: TrainConfig,
    *,
    network: str,
    iterations: int,
    batch_size: int,
    lr: float,
    num_tests: int = 10,
    precision: Precision = "fp32",
    compile: bool = False,
) -> ClassifierSettings:
    """Return the settings of a classifier: the arguments, and for the rest those of the proxy network."""
    return ClassifierSettings(
        network=network,
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        min_lr=min(train.min_lr, lr),
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        nesterov=train.nesterov,
        crop_padding=train.crop_padding,
        flip=train.augmentation in ("crop_flip", "resized_crop_flip"),
        mean=train.mean,
        std=train.std,
        num_tests=num_tests,
        precision=precision,
        compile=compile,
    )


def load_proxy_images(run_dir: RunDir, sample_ids: np.ndarray, size: int) -> np.ndarray:
    """Return the centre squares of proxy images in the order of `sample_ids`, (n, size, size, 3) uint8."""
    data = run_dir.read_rows(schema.PROXY_IMAGES, sample_ids, [schema.IMAGE])[schema.IMAGE].to_pylist()
    return np.stack([decode_proxy_image(image, size) for image in data])


def load_embeddings(run_dir: RunDir, sample_ids: np.ndarray) -> np.ndarray:
    """Return the embeddings of some samples in the order of `sample_ids`, (n, d) float16."""
    return schema.matrix_of(run_dir.read_rows(schema.EMBEDDINGS, sample_ids, [schema.EMBEDDING]), schema.EMBEDDING)


def kept_or_computed(path: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics in a JSON file if an earlier run wrote it; else compute them and write the file."""
    if filesystem.exists(path):
        return json.loads(filesystem.read_bytes(path))
    metrics = compute()
    filesystem.write_bytes(path, json.dumps(metrics).encode())
    return metrics
