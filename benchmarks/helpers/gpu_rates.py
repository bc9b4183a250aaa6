"""Measure the rates of gpu_quarter.py: an encoder, k-means, neighbours, training; next to a matrix product's."""

import functools
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from elfs_ray.methods.encoders.encoder import load_encoder
from elfs_ray.methods.kmeans.assignment import ENGINES, FASTEST_ENGINE, nearest_centroids
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.numeric.faiss_build import device_of_search
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.methods.training.networks import build_proxy_model
from helpers.reporting import take_turns
from helpers.training import ceiling, wait

VIT_FLOP = 35.2e9  # of ViT-B/16 for an image of 224 pixels: 17.6 billion multiply-adds
DIM = 384
SEARCH_ON_GPU = """
import numpy as np
from elfs_ray.methods.neighbors.exact import nearest_neighbors

rows, ids = np.eye(8, dtype=np.float16), np.arange(8)
nearest_neighbors(rows, ids, [(rows, ids)], 2, device="cuda")
"""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: encoder and images; points and clusters of k-means; network, batch, steps to train."""

    encoder: str = "timm/vit_base_patch16_224.dino"
    num_images: int = 1024
    num_points: int = 1_000_000
    num_clusters: int = 1000
    network: str = "resnet18"
    batch_size: int = 256
    num_steps: int = 100


@functools.cache
def search_device(device: str) -> str:
    """Return where faiss searches for neighbours: on a CPU where it is built for those, or fails on the GPU."""
    if device_of_search(device) == "cpu":
        return "cpu"
    # In a process of its own: a faiss for another version of CUDA may end the process.
    searched = subprocess.run([sys.executable, "-c", SEARCH_ON_GPU], capture_output=True, text=True)
    if searched.returncode == 0:
        return device
    print(f"faiss does not search on this GPU, so CPUs search:\n{searched.stderr[-1000:]}", file=sys.stderr)
    return "cpu"


def measure(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Return the rates; under errors, why others cannot be measured here."""
    rates: dict[str, Any] = {"product_tflop_s": ceiling(device, "bf16" if device.type == "cuda" else "fp32") / 1e12}
    engines = ENGINES if search_device(device.type) == device.type else (FASTEST_ENGINE,)
    measurements: dict[str, Callable[[Sizes, torch.device], dict[str, float]]] = {
        "encoder": _rate_of_encoder,
        "training": _rates_of_training,
        **{engine: partial(_rate_of_assignment, engine) for engine in engines},
        "neighbors": _rate_of_neighbors,
    }
    errors = {}
    for name, rates_of in measurements.items():
        try:
            rates |= rates_of(sizes, device)
        except Exception as error:  # a library that is missing or fits no such GPU costs its own rate alone
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
    return {**rates, **({"errors": errors} if errors else {})}


def _rate_of_encoder(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Encode images from memory."""
    weights = None if sizes.encoder == "pixels" else "random:0"
    encoder = load_encoder(sizes.encoder, weights=weights, device=device.type)
    side = encoder.input.crop
    images = np.random.default_rng(0).integers(0, 256, (sizes.num_images, side, side, 3), np.uint8)
    seconds = take_turns({"encode": lambda: [encoder.encode(part) for part in np.split(images, 4)]}, 5)["encode"]
    images_s = sizes.num_images / seconds
    arithmetic = {"encoder_tflop_s": images_s * VIT_FLOP / 1e12} if weights else {}
    return {"encoder_images_s": images_s, **arithmetic}


@functools.cache
def _points(num_points: int) -> np.ndarray:
    """Return random unit vectors (num_points, DIM) float16."""
    rows = np.random.default_rng(0).standard_normal((num_points, DIM), np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def _rate_of_assignment(engine: str, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Assign points to centroids."""
    points = _points(sizes.num_points)
    on_device, centroids = torch.from_numpy(points).to(device), points[: sizes.num_clusters].astype(np.float32)

    def assign() -> None:
        nearest_centroids(on_device, centroids, engine)
        wait(device)

    flop = 2.0 * sizes.num_points * sizes.num_clusters * DIM
    return {f"assignment_{engine}_tflop_s": flop / take_turns({engine: assign}, 5)[engine] / 1e12}


def _rate_of_neighbors(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Find the neighbours of a twentieth of the points, among that twentieth."""
    points = _points(sizes.num_points // 20)
    ids = np.arange(len(points))
    place = search_device(device.type)
    seconds = take_turns({"search": lambda: nearest_neighbors(points, ids, [(points, ids)], 50, device=place)}, 3)
    return {f"neighbors_points_s_{place}": len(points) / seconds["search"]}


def _rates_of_training(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Train from scratch as an evaluation does, and by a bare loop over the same network."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5120, 32, 32, 3), np.uint8)
    train = LabelledImages(images, rng.integers(0, 10, len(images)), np.arange(len(images)))
    settings = ClassifierSettings(
        network=sizes.network,
        iterations=10**6,
        batch_size=sizes.batch_size,
        lr=0.01,
        min_lr=0.0,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
        crop_padding=4,
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        precision="bf16" if device.type == "cuda" else "fp32",
    )
    training = Classifier(10, settings, seed=0, device=device.type)
    steps = training.steps(train)
    bare = _BareSteps(sizes, device)

    def take_steps() -> None:
        for _ in range(sizes.num_steps):
            next(steps)
        wait(device)

    def take_bare_steps() -> None:
        for _ in range(sizes.num_steps):
            bare.step()
        wait(device)

    seconds = take_turns({"training_images_s": take_steps, "bare_training_images_s": take_bare_steps}, 3)
    return {name: sizes.batch_size * sizes.num_steps / each for name, each in seconds.items()}


class _BareSteps:
    """Steps on one batch that is on the device already: no augmentation, no records, compiled on a GPU."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._model = build_proxy_model(sizes.network, 10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._on_gpu:
            self._model.compile(dynamic=False)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
        self._images = torch.randn(sizes.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self._labels = torch.randint(0, 10, (sizes.batch_size,), device=device)

    def step(self) -> None:
        with torch.autocast(self._images.device.type, torch.bfloat16, enabled=self._on_gpu):
            logits = self._model(self._images)
        nn.functional.cross_entropy(logits.float(), self._labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
