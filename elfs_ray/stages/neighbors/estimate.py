"""Estimate stage neighbors."""

from elfs_ray.stages.estimate import GIB, GPU_FLOPS, Estimate, Work
from elfs_ray.stages.neighbors import choose_search, searches_on_gpus

# The inverted file took a million images of 128 dimensions 185 CPU seconds, of which 50 to start (docs/scale.md).
START_S, IMAGE_AND_DIMENSION_S = 50.0, 1.1e-6


def estimate(work: Work) -> Estimate:
    """Return what the search takes. Raises ValueError where the inverted file has to find every neighbour."""
    n, cluster = work.num_samples, work.config.cluster
    if choose_search(cluster, work.devices, n) == "ivf":
        if cluster.kept_neighbors:
            raise ValueError("how many lists the inverted file has to search is measured when it is built")
        cpu_s = START_S + IMAGE_AND_DIMENSION_S * n * work.dim
        basis = "at the rate of a million images"
        return Estimate(cpu_s / max(1, work.devices.num_cpus), 2 * GIB, basis)
    on_gpus = searches_on_gpus(cluster, work.devices)
    flops = GPU_FLOPS * max(1, work.devices.num_gpus) if on_gpus else work.flops
    return Estimate(2 * n * n * work.dim / flops, 2 * n * work.dim + GIB)
