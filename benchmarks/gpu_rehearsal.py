"""Rehearse gpu_quarter.py without a GPU: two steps of each kind in their real shapes, and the least seconds on a GPU.

    python benchmarks/gpu_rehearsal.py
    python benchmarks/gpu_rehearsal.py --quick

One line of JSON for each kind of step: the number of steps in the part, the seconds of one here, operations and bytes
of all of them, and the least seconds of these on an H100 or H200 by its published rates, beside the predicted seconds
of the part. Counted are products (convolutions too) and what they read and write in half precision; real seconds are
more. The steps here are in single precision. --quick takes a 32nd of each batch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_quarter import CIFAR10, NUM_SEEDS
from helpers.gpu_rates import Sizes
from helpers.reporting import command_line
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from elfs_ray.config import TrainConfig, load_config
from elfs_ray.evaluation.workload import load
from elfs_ray.methods.encoders.encoder import load_encoder
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.simclr.training import SimclrTrainer, even_batch, simclr_settings
from elfs_ray.methods.simclr.views import NUM_VIEWS
from elfs_ray.methods.temi.training import TemiTrainer, steps_per_epoch
from elfs_ray.methods.training.classifier import Classifier, LabelledImages
from elfs_ray.presets import preset
from elfs_ray.stages.cluster.temi import temi_settings
from elfs_ray.stages.training.classifier_inputs import training_settings

NUM_POOL, NUM_TEST, SIDE, DIM, NUM_CLASSES, HALF_BYTES = 50_000, 10_000, 32, 512, 10, 2
# Dense products in bfloat16 and the bandwidth of memory, as NVIDIA publishes them for the SXM modules.
FLOP_S = 989e12
BYTES_S = {"h100": 3.35e12, "h200": 4.8e12}


@dataclass(frozen=True)
class Kind:
    """Steps of one kind: the part that takes `num_steps` of them, and a function that takes one of a share of them."""

    part: str
    name: str
    num_steps: int
    take: Callable[[], object]
    share: float  # of a step's rows that `take` takes
    flop: float = 0.0  # of what torch does not count, because faiss does it


class Count(TorchDispatchMode):
    """Count the operations of products, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.flop, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:  # as torch's FlopCounterMode does: a layer may arrive here before it is divided into products
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(HALF_BYTES * tensor.numel() for tensor in tensors)
        return result


def kinds(share: float) -> Iterator[Kind]:
    """Yield the steps of all parts, each with that share of its batch."""
    keys = (*CIFAR10["pipeline"], "pool.uri=/cifar10", "run_dir=/runs")
    config = load_config(preset("cifar10"), keys)
    rng = np.random.default_rng(0)
    pretrain = simclr_settings(vars(config.pretrain), SIDE)
    batch = even_batch(NUM_POOL, pretrain.batch_size)
    num_steps = math.ceil(NUM_POOL / batch)
    trainer = SimclrTrainer(pretrain, num_steps, 0, device=torch.device("cpu"))
    images = int(batch * share)
    views = torch.rand(NUM_VIEWS * images, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    yield Kind(
        *("encoder", f"SimCLR of {pretrain.network}, {batch} images", num_steps * pretrain.epochs),
        lambda: trainer.step(views, [images], epoch=0, step=0),
        images / batch,
    )

    queries = int(1024 * share)
    rows = rng.standard_normal((NUM_POOL, DIM), np.float32)
    points = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    ids = np.arange(NUM_POOL)
    yield Kind(
        *("clusters", "50 neighbours of 1,024 images", math.ceil(NUM_POOL / 1024)),
        lambda: nearest_neighbors(points[:queries], ids[:queries], [(points, ids)], 50),
        queries / 1024,
        2.0 * queries * NUM_POOL * DIM,
    )
    temi = temi_settings(config.cluster.temi, NUM_CLASSES, NUM_POOL, 1)
    heads = TemiTrainer(temi, DIM, steps_per_epoch(NUM_POOL, temi), seed=0)
    x = torch.from_numpy(points[: int(temi.batch_size * share)])
    num_steps = temi.num_epochs * steps_per_epoch(NUM_POOL, temi)
    name = f"TEMI, {temi.num_heads} heads, {temi.batch_size} images"
    yield Kind("clusters", name, num_steps, lambda: heads.train_step(x, x), len(x) / temi.batch_size)

    yield from trainings(share, config.train)
    encoder = load_encoder(Sizes.encoder, weights="random:0")
    size = encoder.input.crop
    pixels = rng.integers(0, 256, (max(1, int(32 * share)), size, size, 3), np.uint8)
    name = f"{Sizes.encoder}, 32 images of {size} pixels"
    yield Kind("rates", name, 6 * Sizes.num_images // 32, lambda: encoder.encode(pixels), len(pixels) / 32)


def trainings(share: float, proxy: TrainConfig) -> Iterator[Kind]:
    """Yield the steps of the proxy's network and of the trainings from scratch, of the same shape, and tests."""
    keys = load(["runs=[/runs]", "out=/out", "test_uri=/test", *CIFAR10["evaluation"]])
    settings = training_settings(
        proxy, network=keys.network, iterations=keys.iterations, batch_size=keys.batch_size, lr=keys.lr
    )
    assert (proxy.network, proxy.batch_size) == (keys.network, keys.batch_size)
    rng = np.random.default_rng(0)
    rows = int(keys.batch_size * share)
    images = rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)
    batch = LabelledImages(images, rng.integers(0, NUM_CLASSES, rows), np.arange(rows))
    training = Classifier(NUM_CLASSES, settings, seed=0)
    steps = training.steps(batch)
    name = f"{keys.network}, {keys.batch_size} images"
    num_methods = len(CIFAR10["methods"])
    num_proxy_steps = proxy.epochs * math.ceil(NUM_POOL / proxy.batch_size)
    counts = {"proxy": num_proxy_steps}
    counts["pruned_90"] = NUM_SEEDS[0.1] * num_methods * keys.iterations + num_proxy_steps  # CCS has its own proxy
    counts["pruned_70"] = NUM_SEEDS[0.3] * num_methods * keys.iterations  # without aum_ccs, but with all images
    for part, num_steps in counts.items():
        yield Kind(part, name, num_steps, lambda: next(steps), rows / keys.batch_size)
    num_batches = NUM_SEEDS[0.1] * num_methods * keys.num_tests * NUM_TEST // keys.batch_size
    yield Kind(
        "pruned_90", f"tests on {keys.batch_size} images", num_batches, lambda: training.accuracy(batch), rows / 256
    )


def rehearse(kind: Kind) -> tuple[float, float, float]:
    """Take two steps; return the seconds, operations and bytes of a whole one."""
    start_s = time.perf_counter()
    kind.take()
    seconds = time.perf_counter() - start_s
    with Count() as count:
        kind.take()
    return seconds / kind.share, (count.flop + kind.flop) / kind.share, count.bytes / kind.share


def report(kind: Kind, step_s: float, flop: float, num_bytes: float) -> None:
    """Print what all steps of a kind take at least on a GPU."""
    operations, moved = flop * kind.num_steps, num_bytes * kind.num_steps
    least = {f"least_s_{gpu}": max(operations / FLOP_S, moved / rate) for gpu, rate in BYTES_S.items()}
    figures = {"step_s_here": step_s, "tflop": operations / 1e12, "tbyte": moved / 1e12, **least}
    line = {"part": kind.part, "step": kind.name, "steps": kind.num_steps}
    line |= {name: float(f"{value:.3g}") for name, value in figures.items()}
    print(json.dumps({**line, "part_predicted_s": CIFAR10["predicted_s"][kind.part]}), flush=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a 32nd of each batch; under 45 s on 2 cores")
    measured: dict[str, tuple[float, float, float]] = {}  # some parts have steps of the same kind
    for kind in kinds(1 / 32 if parser.parse_args().quick else 1.0):
        if kind.name not in measured:
            measured[kind.name] = rehearse(kind)
        report(kind, *measured[kind.name])


if __name__ == "__main__":
    main()
