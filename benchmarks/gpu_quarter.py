"""Measure the product on one large GPU in a quarter of an hour: CIFAR-10 at 90% and 70% pruned, in repeatable parts.

    until python benchmarks/gpu_quarter.py --data pools/cifar10; do [ $? = 3 ] || break; done
    python benchmarks/gpu_quarter.py --data pools/cifar10 --part encoder [key=value ...]
    python benchmarks/gpu_quarter.py --quick [--folder FOLDER]

--data has train/ and test/ as `elfs-ray prepare` writes them, or train.parquet and test.parquet (image, label). Nothing
else is needed: the encoder, a ResNet-18, is trained on the pool. The parts, in order:

    tests        pytest -m gpu; junit.xml has every failure
    encoder      SimCLR on the pool, compiled
    clusters     embeddings, neighbours, k-means and TEMI with 50 heads
    proxy        ResNet-18 on the pseudo-labels, scores, coresets
    pruned_90    trainings from scratch on 10% of the images: every selection, a few seeds, the same number of steps
    pruned_70    the same on 30%, and on all images
    rates        encoder, k-means and neighbours vs. the GPU's matrix product, and trainings from scratch

Each part writes a line to results.jsonl in --folder once it is finished, and is never repeated; a part that is stopped
in the middle continues from its last epoch or training. Exit code 3 after --minutes means that parts are left: the same
command continues. Keys after the options go to the pipeline, over those of CIFAR10 below. --quick runs every part on
1,000 digits and CPUs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.reporting import command_line, take_turns
from helpers.tracks import ROOT, parts_of, run_for, write_digits
from helpers.training import ceiling, wait
from torch import nn

from elfs_ray import load_config
from elfs_ray.evaluation import run as evaluation
from elfs_ray.evaluation.report import ALL
from elfs_ray.evaluation.workload import load
from elfs_ray.methods.encoders.encoder import load_encoder
from elfs_ray.methods.kmeans.assignment import ENGINES, nearest_centroids
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages
from elfs_ray.methods.training.networks import build_proxy_model
from elfs_ray.pipeline import runner
from elfs_ray.presets import preset
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.pretrain import PretrainResult
from elfs_ray.stages.select import SelectResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage.run_dir import RunDir

RESULTS = "results.jsonl"
VIT_FLOP = 35.2e9  # of ViT-B/16 for an image of 224 pixels: 17.6 billion multiply-adds


@dataclass(frozen=True)
class Work:
    """What is measured, where, and how large.

    pipeline, evaluation: keys over the preset cifar10 and of the evaluation. predicted_s: by part, from published and
    earlier rates. The rest are sizes of the part rates.
    """

    pool: Path
    test: Path
    folder: Path
    pipeline: tuple[str, ...]
    evaluation: tuple[str, ...]
    methods: tuple[str, ...]
    predicted_s: dict[str, float]
    encoder: str = "timm/vit_base_patch16_224.dino"
    num_images: int = 1024
    num_points: int = 1_000_000
    num_clusters: int = 1000
    network: str = "resnet18"
    num_steps: int = 100

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


NUM_SEEDS = {0.1: 2, 0.3: 1}  # by the share of the images
METHODS = ("random", "elfs", "elfs+hard_fraction=0.4", "elfs+balance=true", "coverage", "auto", "aum_ccs")
CIFAR10: dict[str, Any] = {
    "pipeline": (
        *("embed.encoder=self_supervised", "embed.image_size=null", "pretrain.epochs=150", "pretrain.compile=true"),
        "pretrain.num_workers=1",
        *("pretrain.temperature=0.2", "pretrain.lr=0.15", "pretrain.min_crop_area=0.2"),
        *("train.epochs=25", "train.compile=true", "select.hard_fraction=auto", "budget=[0.1,0.3]"),
    ),
    "evaluation": ("network=resnet18", "iterations=3000", "num_tests=3", "gpus_per_training=0.25"),
    "methods": METHODS,
    "predicted_s": {
        "tests": 60,
        "encoder": 240,
        "clusters": 75,
        "proxy": 60,
        "pruned_90": 250,
        "pruned_70": 110,
        "rates": 60,
    },
}
# With --quick there is neither a GPU nor time: small networks, and an epoch or two of everything.
QUICK: dict[str, Any] = {
    "pipeline": (
        *("embed.encoder=self_supervised", "embed.image_size=null", "pretrain.profile=cpu", "pretrain.epochs=1"),
        *("embed.proxy_image_size=16", "cluster.temi.profile=cpu", "cluster.temi.num_epochs=1"),
        *("train.network=small_cnn", "train.epochs=2", "train.batch_size=128", "select.hard_fraction=auto"),
        *("budget=[0.1,0.3]", "ray_address=local"),
    ),
    "evaluation": (
        *("network=small_cnn", "iterations=10", "num_tests=1", "batch_size=32", "lr=0.05", "ray_address=local"),
    ),
    "methods": METHODS,
    "predicted_s": {},
    "encoder": "pixels",
    "num_images": 64,
    "num_points": 5000,
    "num_clusters": 20,
    "network": "small_cnn",
    "num_steps": 5,
}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument(
        "--folder", type=Path, help="of the run and results; default runs/gpu_quarter, with --quick none"
    )
    parser.add_argument("--part", choices=list(PARTS), action="append", help="run this part only; repeatable")
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after so many minutes")
    parser.add_argument("--quick", action="store_true", help="every part on 1,000 digits and CPUs")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="keys of the pipeline")
    arguments = parser.parse_args()
    names = arguments.part or list(PARTS)
    if arguments.quick:
        with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
            work = Work(*write_digits(Path(folder)), Path(folder), **QUICK)
            return run_for(arguments.minutes, partial(run_parts, work, names))
    if arguments.data is None:
        parser.error("give --data, a folder with train.parquet and test.parquet, or --quick")
    settings = {**CIFAR10, "pipeline": (*CIFAR10["pipeline"], *arguments.keys)}
    work = Work(*parts_of(arguments.data), arguments.folder or Path("runs/gpu_quarter"), **settings)
    return run_for(arguments.minutes, partial(run_parts, work, names))


def run_parts(work: Work, names: list[str]) -> None:
    """Run the parts that have no line in results.jsonl yet, and write one for each."""
    work.folder.mkdir(parents=True, exist_ok=True)
    path = work.folder / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    finished = {json.loads(line)["part"] for line in lines}
    for name in names:
        if name in finished:
            continue
        print(f"{name}: {work.predicted_s.get(name, '?')} s predicted", file=sys.stderr)
        start_s = time.monotonic()
        figures = PARTS[name](work)
        seconds = round(time.monotonic() - start_s, 1)
        line = {"part": name, "seconds": seconds, "predicted_s": work.predicted_s.get(name), **figures}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line), flush=True)


def run_tests(work: Work) -> dict[str, Any]:
    """Run the tests that need a GPU; without one only list them."""
    report = work.folder.absolute() / "junit.xml"
    options = ["-q", f"--junitxml={report}"] if work.device == "cuda" else ["--collect-only", "-q"]
    code = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *options], cwd=ROOT, stdout=sys.stderr)
    if work.device == "cpu":
        return {"exit_code": code.returncode}
    (suite,) = ElementTree.parse(report).getroot()
    failed = [
        f"{case.get('classname')}::{case.get('name')}" for case in suite if case.find("skipped") is None and len(case)
    ]
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")} | {"failed": failed}


def train_encoder(work: Work) -> dict[str, Any]:
    """Train the encoder on the pool alone."""
    run_dir = _run_pipeline(work, "pretrain")
    history = PretrainResult.read(run_dir).history
    rates = [metrics["images_per_s"] for metrics in history[1:]]
    return {
        "epochs": len(history),
        "images_per_s": float(np.median(rates)) if rates else None,
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
    }


def make_clusters(work: Work) -> dict[str, Any]:
    """Embed, find neighbours and cluster."""
    result = ClusterResult.read(_run_pipeline(work, "cluster"))
    return {"sizes": result.sizes, "trust": dict(result.trust or {})}


def train_proxy(work: Work) -> dict[str, Any]:
    """Train the proxy, score and select."""
    run_dir = _run_pipeline(work, None)
    history = TrainResult.read(run_dir).history
    coresets = SelectResult.read(run_dir).coresets
    return {
        "images_per_s": float(np.median([metrics["images_per_s"] for metrics in history])),
        "hard_fractions": {name: coreset.hard_fraction for name, coreset in coresets.items()},
    }


def evaluate_pruned_90(work: Work) -> dict[str, Any]:
    """Train on 10% of the images by every method."""
    return _evaluate(work, 0.1, work.methods)


def evaluate_pruned_70(work: Work) -> dict[str, Any]:
    """Train on 30% of the images by the methods without a proxy of their own, and on all images as the ceiling."""
    return _evaluate(work, 0.3, ("full", *(name for name in work.methods if name != "aum_ccs")))


def measure_rates(work: Work) -> dict[str, Any]:
    """Measure rates, next to those of matrix products on the same device."""
    device = torch.device(work.device)
    rates = {"product_tflop_s": ceiling(device, "bf16" if work.device == "cuda" else "fp32") / 1e12}
    rates |= _rate_of_encoder(work)
    rates |= _rates_of_assignment(work, device)
    return rates | _rates_of_training(work, device)


PARTS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "tests": run_tests,
    "encoder": train_encoder,
    "clusters": make_clusters,
    "proxy": train_proxy,
    "pruned_90": evaluate_pruned_90,
    "pruned_70": evaluate_pruned_70,
    "rates": measure_rates,
}


def _run_pipeline(work: Work, until: str | None) -> RunDir:
    places = (f"pool.uri={work.pool}", "pool.label=label", f"run_dir={work.run_dir}")
    keys = [*work.pipeline, *places, *([f"until={until}"] if until else [])]
    return runner.run(load_config(preset("cifar10"), keys))


def _evaluate(work: Work, budget: float, methods: tuple[str, ...]) -> dict[str, Any]:
    keys = [f"runs=[{work.run_dir}]", f"out={work.folder / 'judged'}", f"test_uri={work.test}"]
    keys += [f"methods=[{','.join(methods)}]", f"budgets=[{budget}]", f"num_seeds={NUM_SEEDS[budget]}"]
    results = evaluation.run(load([*keys, *work.evaluation]))
    (quality,) = results.quality.values()
    assert quality.clustering is not None
    accuracies = {}
    for line in results.lines:
        cell = line.cells.get(str(budget)) or line.cells[ALL]
        accuracies[line.name] = [round(100 * cell.mean, 2), round(100 * cell.spread, 2)]
    return {
        "accuracies": accuracies,
        "pseudo_labels_right": quality.clustering.accuracy,
        "nearest_10_right": quality.neighbors.accuracy,
    }


def _rate_of_encoder(work: Work) -> dict[str, float]:
    """Encode images from memory."""
    weights = None if work.encoder == "pixels" else "random:0"
    encoder = load_encoder(work.encoder, weights=weights, device=work.device)
    size = encoder.input.crop
    images = np.random.default_rng(0).integers(0, 256, (work.num_images, size, size, 3), np.uint8)
    seconds = take_turns({"encode": lambda: [encoder.encode(part) for part in np.split(images, 4)]}, 5)["encode"]
    images_s = work.num_images / seconds
    arithmetic = {"encoder_tflop_s": images_s * VIT_FLOP / 1e12} if weights else {}
    return {"encoder_images_s": images_s, **arithmetic}


def _rates_of_assignment(work: Work, device: torch.device) -> dict[str, float]:
    """Assign points to centroids by both engines, and find the neighbours of some."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((work.num_points, 384), np.float32)
    points = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    on_device, centroids = torch.from_numpy(points).to(device), points[: work.num_clusters].astype(np.float32)

    def assign(engine: str) -> None:
        nearest_centroids(on_device, centroids, engine)
        wait(device)

    seconds = take_turns({engine: partial(assign, engine) for engine in ENGINES}, 5)
    flop = 2.0 * work.num_points * work.num_clusters * 384
    some, ids = points[: work.num_points // 10], np.arange(work.num_points // 10)
    neighbors = take_turns(
        {"neighbors": lambda: nearest_neighbors(some, ids, [(some, ids)], 50, device=work.device)}, 3
    )
    return {f"assignment_{engine}_tflop_s": flop / each / 1e12 for engine, each in seconds.items()} | {
        "neighbors_points_s": len(some) / neighbors["neighbors"]
    }


def _rates_of_training(work: Work, device: torch.device) -> dict[str, float]:
    """Train from scratch as an evaluation does, and by a bare loop over the same network."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5120, 32, 32, 3), np.uint8)
    train = LabelledImages(images, rng.integers(0, 10, len(images)), np.arange(len(images)))
    settings = ClassifierSettings(
        network=work.network,
        iterations=10**6,
        batch_size=256,
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
    training = Classifier(10, settings, seed=0, device=work.device)
    steps = training.steps(train)
    bare = _BareSteps(work.network, device)

    def take_steps() -> None:
        for _ in range(work.num_steps):
            next(steps)
        wait(device)

    def take_bare_steps() -> None:
        for _ in range(work.num_steps):
            bare.step()
        wait(device)

    seconds = take_turns({"training_images_s": take_steps, "bare_training_images_s": take_bare_steps}, 3)
    return {name: 256 * work.num_steps / each for name, each in seconds.items()}


class _BareSteps:
    """Steps on one batch that is on the device already: no augmentation, no records, compiled on a GPU."""

    def __init__(self, network: str, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._model = build_proxy_model(network, 10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._on_gpu:
            self._model.compile(dynamic=False)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
        self._images = torch.randn(256, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self._labels = torch.randint(0, 10, (256,), device=device)

    def step(self) -> None:
        with torch.autocast(self._images.device.type, torch.bfloat16, enabled=self._on_gpu):
            logits = self._model(self._images)
        nn.functional.cross_entropy(logits.float(), self._labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
