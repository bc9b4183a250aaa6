"""Estimate stage neighbors."""

from elfs_ray.stages.estimate import GIB, GPU_FLOPS, Estimate, Work
from elfs_ray.stages.neighbors import searches_on_gpus


def estimate(work: Work) -> Estimate:
    """Return what an exact search takes; the inverted file, which large pools get on CPUs, takes less."""
    n = work.num_samples
    on_gpus = searches_on_gpus(work.config.cluster, work.devices)
    flops = GPU_FLOPS * max(1, work.devices.num_gpus) if on_gpus else work.flops
    return Estimate(2 * n * n * work.dim / flops, 2 * n * work.dim + GIB)
