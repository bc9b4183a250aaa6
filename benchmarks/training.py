"""What the benchmarks of training share: images, a Ray Train worker to measure in, what a device could do at most.

Not in reporting.py, because torch in a process would add to the peaks of memory that others measure.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
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

RESULT = "result.json"


def begin(doc: str | None) -> bool:
    """Read the command line and start a Ray of its own; whether --quick was typed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one worker beside the loops; under 45 s on 2 cores")
    quick = parser.parse_args().quick
    connect("local")
    return quick


def measure_in_worker(measure: Callable[..., Any], run_dir: RunDir, gpus: float, **given: Any) -> Any:
    """What `measure` returns, as JSON holds it, from a Ray Train worker that has every core and that much of a GPU."""
    resources = {"CPU": num_cpus(), **({"GPU": gpus} if gpus else {})}
    TorchTrainer(
        _write_result,
        train_loop_config={"measure": measure, "result": run_dir.path(RESULT), "given": given},
        scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=ray.train.RunConfig(storage_path=run_dir.path("ray_train")),
    ).fit()
    return json.loads(filesystem.read_bytes(run_dir.path(RESULT)))


def _write_result(config: dict[str, Any]) -> None:
    filesystem.write_bytes(config["result"], json.dumps(config["measure"](**config["given"])).encode())


def smooth_png(coarse: np.ndarray, size: int) -> bytes:
    """A few pixels (h, w, 3) uint8 made an image of `size` pixels without edges: it compresses as photographs do."""
    return encode_png(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), compress_level=1)


def ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of a matrix product in the precision of a training."""
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
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
