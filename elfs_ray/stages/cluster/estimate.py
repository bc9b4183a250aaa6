"""Estimate stage cluster."""

from elfs_ray.methods.kmeans.num_clusters import MAX_CLUSTERS, MIN_ROWS_PER_CLUSTER
from elfs_ray.stages.cluster import request_shards, request_temi_workers
from elfs_ray.stages.cluster.temi import temi_settings
from elfs_ray.stages.estimate import GIB, GPU_FLOPS, STATED, Estimate, Work

PASSES = 8  # forward passes' worth of work in a TEMI step: two views through the student, thrice, and the teacher


def estimate(work: Work) -> Estimate:
    """Return what k-means takes with all its iterations, and TEMI where the config has it."""
    cluster, n = work.config.cluster, work.num_samples
    if cluster.method == "file":
        return Estimate(0, GIB / 2)
    auto = cluster.num_clusters == "auto"
    num_clusters = min(MAX_CLUSTERS, n // MIN_ROWS_PER_CLUSTER) if auto else int(cluster.num_clusters)
    iterations = cluster.num_tries * cluster.max_iterations
    seconds = 2 * n * num_clusters * work.dim * iterations / work.flops
    memory = 2 * n * work.dim / request_shards(cluster, work.devices).fewest + GIB
    if cluster.method == "temi":
        request = request_temi_workers(cluster, work.devices)
        settings = temi_settings(cluster.temi, num_clusters, n, request.most)
        dim = settings.pca_dim or work.dim
        weights = dim * settings.hidden_dim + settings.hidden_dim * settings.bottleneck_dim
        weights = settings.num_heads * (weights + settings.bottleneck_dim * num_clusters)
        flops = 2 * PASSES * weights * settings.num_epochs * n
        seconds += flops / (GPU_FLOPS * request.most if request.gpus else work.flops)
        memory = max(memory, 2 * n * dim + 20 * weights + GIB)
    return Estimate(seconds, memory, f"at most; {STATED}")
