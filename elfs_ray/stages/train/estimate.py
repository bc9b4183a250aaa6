"""Estimate stage train."""

from elfs_ray.config import LINEAR
from elfs_ray.methods.kmeans.num_clusters import MAX_CLUSTERS
from elfs_ray.stages.estimate import GIB, Estimate, Work
from elfs_ray.stages.train import FROM_EMBEDDINGS, needs_whole_images, request_proxy_workers
from elfs_ray.stages.training import planned_reading
from elfs_ray.stages.training.estimate import measure_training

BACKWARD = 3  # times the work of a forward pass is that of a step


def estimate(work: Work) -> Estimate:
    """Return what it takes to train the proxy. Raises RuntimeError where it cannot be measured."""
    train, n = work.config.train, work.num_samples
    if train.network == LINEAR:
        clusters = work.config.cluster.num_clusters
        layer = work.dim * (clusters if isinstance(clusters, int) else MAX_CLUSTERS)
        return Estimate(2 * BACKWARD * n * train.epochs * layer / work.flops, 2 * work.dim * n + GIB)
    reading = planned_reading(train.reading, needs_whole_images=needs_whole_images(work.config))
    request = request_proxy_workers(work.config, work.devices, reading or FROM_EMBEDDINGS)
    size = train.image_size or work.config.embed.proxy_image_size
    rate, memory = measure_training(request, train.network, size)
    pixels = 0 if reading == "streamed" else 3 * size * size * n
    basis = f"measured here: {rate:,.3g} images/s"
    return Estimate(n * train.epochs / rate, memory + pixels, basis)
