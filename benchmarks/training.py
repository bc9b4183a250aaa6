"""What the benchmarks of training share: images to train on, and what a device could do at most.

Not in reporting.py, because torch in a process would add to the peaks of memory that others measure.
"""

import io
import statistics
import time

import numpy as np
import torch
from PIL import Image


def smooth_png(coarse: np.ndarray, size: int) -> bytes:
    """A few pixels (h, w, 3) uint8 made an image of `size` pixels without edges: it compresses as photographs do."""
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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
