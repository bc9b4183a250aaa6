"""Train networks in several stages alike: readers, worker groups, checkpoints, epoch logs."""

import dataclasses
from typing import TYPE_CHECKING

from elfs_ray.config import ConfigError, PretrainConfig, TrainConfig, worker_range
from elfs_ray.runtime.resources import Request, request_workers

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


# Decoded images of the largest pool that needs no Ray (pipeline/connection.py) then take a gigabyte at most.
MAX_SIDE_WITHOUT_RAY = 256


def check_network(key: str, network: str, *others: str) -> None:
    """Raise ConfigError for a network that is neither an image network nor among `others`."""
    # Imported only here, since it imports torch and this module must be light (stages/stage.py).
    from elfs_ray.methods.training.networks import PROXY_MODELS

    known = (*PROXY_MODELS, *others)
    if network not in known:
        raise ConfigError(f"{key}={network!r}: must be one of {', '.join(known)}")


def planned_reading(configured: str, *, needs_whole_images: bool) -> str | None:
    """Return how images will be read, memory or streamed; None if that depends on the size of the pool."""
    if configured != "auto":
        return configured
    return "streamed" if needs_whole_images else None


def needs_ray(num_workers: int | str | None, reading: str | None, side: int = 0) -> bool:
    """Return whether a training on CPUs needs Ray for a small pool, too: several workers, or processes that decode.

    One worker is as fast in the command's own process: it computes with a thread for each CPU there and in Ray Train.
    reading: as `planned_reading` returns it. side: of the images that are decoded, in pixels.
    """
    limits = worker_range(num_workers, "num_workers")
    return (limits or (1, 1))[1] > 1 or reading == "streamed" or side > MAX_SIDE_WITHOUT_RAY


def request_training_workers(
    devices: "Devices",
    key: str,
    section: TrainConfig | PretrainConfig,
    *,
    num_workers: int | str | None,
    reading: str | None,
) -> Request:
    """Return the workers that train a network.

    `reading` is memory, streamed, or another word if no images are read; None if it is not known yet. With
    cpus_per_worker=null, workers share the CPUs equally, to compute or to decode streamed images. A worker with a GPU
    and all of its inputs in memory has nothing to decode and gets one CPU.
    """
    request = request_workers(
        devices,
        key,
        "worker",
        device=section.device,
        num_workers=num_workers,
        usual=1,
        cpus=section.cpus_per_worker,
        memory_gib=section.memory_gib,
    )
    if section.cpus_per_worker or not request.gpus or reading == "streamed":
        return request
    if reading is None:
        return dataclasses.replace(request, fewest_cpus=1)
    return dataclasses.replace(request, cpus=1)
