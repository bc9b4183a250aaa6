"""Estimate what a stage takes: time and memory, from a short measurement on this machine or from stated rates.

The functions of a stage are in its estimate.py. They take seconds and import torch, so that only --dry-run and the
start of a long run call them.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elfs_ray.config import Config
from elfs_ray.runtime.progress import format_duration
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:  # importing it imports Ray
    from elfs_ray.runtime.cluster import Devices

GIB = 1 << 30
MEASURE_S = 2.0
TIMEOUT_S = 120
# Matrix products a second of one CPU core and of one GPU, as measured for k-means, TEMI and neighbours (BENCHMARKS.md).
CPU_FLOPS, GPU_FLOPS = 60e9, 87e12
STATED = "arithmetic alone, at stated rates"


@dataclass(frozen=True)
class Work:
    """What is estimated: a run over so many samples, on these devices. dim: of an embedding, 0 if not known yet."""

    config: Config
    run_dir: RunDir
    num_samples: int
    devices: "Devices"
    dim: int = 0

    @property
    def flops(self) -> float:
        """Return the rate of all CPUs in matrix products."""
        return CPU_FLOPS * max(1, self.devices.num_cpus)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a stage, bytes of its largest worker, what both come from, and what it has learnt for later stages."""

    seconds: float
    memory_bytes: float
    basis: str = STATED
    dim: int = 0

    def describe(self) -> str:
        """Return a line such as "about 2:05, 0.9 GiB a worker; measured here: 12 images/s a CPU"."""
        return f"about {format_duration(self.seconds)}, {self.memory_bytes / GIB:.1f} GiB a worker; {self.basis}"


def rate_of(work: Callable[[int], object], most: int) -> float:
    """Return the items a second of calls that are given a number of items, of about two seconds altogether.

    The number grows from 2 to `most` until a call takes long enough, as few items at once take longer each.
    """
    number, seconds = 2, _time(work, 2)
    if seconds < MEASURE_S:  # else this first call counts, though it warms up
        seconds = _time(work, number)
        while seconds < MEASURE_S / 8 and number < most:
            number = min(4 * number, most)
            seconds = _time(work, number)
    done, spent_s = number, seconds
    while spent_s < MEASURE_S:
        done, spent_s = done + number, spent_s + _time(work, number)
    return done / spent_s


def _time(work: Callable[[int], object], number: int) -> float:
    start_s = time.perf_counter()
    work(number)
    return time.perf_counter() - start_s


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments) of a process in the environment of Ray's workers, which decides its speed.

    Raises RuntimeError if it fails.
    """
    from elfs_ray.runtime.cluster import WORKER_ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job"), Path(folder, "result")
        job.write_bytes(pickle.dumps((function, arguments)))
        script = "import sys; from elfs_ray.stages.estimate import answer; answer(*sys.argv[1:])"
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            subprocess.run(
                [sys.executable, "-c", script, str(job), str(result)],
                env=os.environ | WORKER_ENVIRONMENT | paths,
                check=True,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError((error.stderr.strip().splitlines() or [str(error)])[-1]) from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no measurement within {TIMEOUT_S} s") from error
        return pickle.loads(result.read_bytes())


def require_local_gpus() -> None:
    """Raise RuntimeError if this machine has no GPU on which to measure what GPUs elsewhere take."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("its GPUs are not on this machine")


def answer(job: str, result: str) -> None:
    """Do the work of `in_worker` in its process."""
    function, arguments = pickle.loads(Path(job).read_bytes())
    Path(result).write_bytes(pickle.dumps(function(*arguments)))
