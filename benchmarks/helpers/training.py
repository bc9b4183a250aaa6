"""Measure training: in a Ray Train worker, epochs of contestants in turn, and the peak rate of a device.

Separate from reporting.py, because importing torch would add to the peaks of memory that other benchmarks measure.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import ray.train
import torch
from PIL import Image
from ray.train.torch import TorchTrainer

from elfs_ray.pool.images import encode_png
from elfs_ray.runtime.cluster import connect, num_cpus
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from helpers.reporting import command_line, take_turns

RESULT = "result.json"


def begin(doc: str | None) -> bool:
    """Read the command line and start a local Ray. Return whether --quick was requested."""
    parser = command_line(doc)
    parser.add_argument("--quick", action="store_true", help="one worker vs. the loops; under 45 s on 2 cores")
    quick = parser.parse_args().quick
    connect("local")
    return quick


def measure_in_worker(measure: Callable[..., Any], run_dir: RunDir, gpus: float, **arguments: Any) -> Any:
    """Return `measure(**arguments)`, through JSON, from a Ray Train worker with all cores and that share of a GPU."""
    resources = {"CPU": num_cpus(), **({"GPU": gpus} if gpus else {})}
    TorchTrainer(
        _write_result,
        train_loop_config={"measure": measure, "result": run_dir.path(RESULT), "arguments": arguments},
        scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=ray.train.RunConfig(storage_path=run_dir.path("ray_train")),
    ).fit()
    return json.loads(filesystem.read_bytes(run_dir.path(RESULT)))


def _write_result(config: dict[str, Any]) -> None:
    filesystem.write_bytes(config["result"], json.dumps(config["measure"](**config["arguments"])).encode())


def smooth_png(coarse: np.ndarray, size: int) -> bytes:
    """Enlarge a few pixels (h, w, 3) uint8 to an image of `size` pixels, as a PNG."""
    # Without edges or noise, so that it compresses and decodes about as photographs do.
    return encode_png(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), compress_level=1)


def images_per_s(
    contestants: Mapping[str, Callable[[int], object]], num_images: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median images a second of each contestant, which train an epoch in turn after one to warm up."""
    epochs = {name: count() for name in contestants}

    def train(name: str) -> None:
        contestants[name](next(epochs[name]))
        wait(device)

    seconds = take_turns({name: partial(train, name) for name in contestants}, rounds)
    return {name: num_images / taken for name, taken in seconds.items()}


def ceiling(device: torch.device, precision: str) -> float:
    """Return the operations a second of a matrix product in the precision of a training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start_s = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - start_s)
    return 2 * n**3 / statistics.median(times)


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished all work, which it takes asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
