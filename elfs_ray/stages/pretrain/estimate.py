"""Estimate stage pretrain."""

from elfs_ray.methods.simclr.training import simclr_settings
from elfs_ray.stages.estimate import Estimate, Work
from elfs_ray.stages.pretrain import request_pretraining_workers
from elfs_ray.stages.training.estimate import measure_training

NUM_VIEWS = 2  # of each image, which the network sees in a step


def estimate(work: Work) -> Estimate:
    """Return what it takes to train the encoder. Raises RuntimeError where it cannot be measured."""
    config, n = work.config, work.num_samples
    size = config.pretrain.image_size or config.embed.proxy_image_size
    settings = simclr_settings(vars(config.pretrain), size)
    request = request_pretraining_workers(config, work.devices, config.pretrain.reading)
    rate, memory = measure_training(request, settings.network, size)
    basis = f"measured here: {rate / NUM_VIEWS:,.3g} images/s of {NUM_VIEWS} views"
    return Estimate(NUM_VIEWS * n * settings.epochs / rate, memory + 3 * size * size * n, basis)
