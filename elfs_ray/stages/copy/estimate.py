"""Estimate stage copy: decode and copy a few of the pool's images for about two seconds."""

import resource

from elfs_ray.config import Config
from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image
from elfs_ray.stages.embed.blocks import BLOCK_PIXEL_BYTES
from elfs_ray.stages.embed.estimate import sample_images
from elfs_ray.stages.estimate import Estimate, Work, in_worker, rate_of


def estimate(work: Work) -> Estimate:
    """Return what it takes to copy all samples. Raises RuntimeError where it cannot be measured."""
    rate, peak_bytes = in_worker(measure, work.config, sample_images(work))
    seconds = work.num_samples / (rate * max(1, work.devices.num_cpus))
    return Estimate(seconds, peak_bytes + BLOCK_PIXEL_BYTES, f"measured here: {rate:,.3g} images/s a CPU")


def measure(config: Config, images: list[bytes]) -> tuple[float, float]:
    """Return copied images a second of one thread, and the peak memory of this process."""

    def copy(number: int) -> None:
        for data in images[:number]:
            try:
                _copy(config, data)
            except BadImage:
                continue

    rate = rate_of(copy, len(images))
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _copy(config: Config, data: bytes) -> None:
    embed = config.embed
    image = decode_image(data, max_pixels=embed.max_image_pixels, min_size=embed.proxy_image_size)
    encode_proxy_image(image, short_side=embed.proxy_image_size, jpeg_quality=embed.proxy_jpeg_quality)
