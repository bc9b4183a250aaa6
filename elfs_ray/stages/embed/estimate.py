"""Estimate stage embed: decode and encode a few of the pool's images for about two seconds each."""

import resource
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from elfs_ray.config import Config
from elfs_ray.methods.encoders.encoder import EncoderInput, encoder_input, is_fetched, load_encoder
from elfs_ray.methods.encoders.openvino_runtime import BATCH_SIZE as OPENVINO_BATCH
from elfs_ray.methods.encoders.processor import OPENVINO
from elfs_ray.methods.simclr.training import simclr_settings
from elfs_ray.methods.training.networks import build_backbone
from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image, resize_center_crop
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from elfs_ray.runtime.resources import Request
from elfs_ray.stages.embed import request_encoders
from elfs_ray.stages.embed.blocks import BLOCK_PIXEL_BYTES
from elfs_ray.stages.estimate import Estimate, Work, in_worker, rate_of, require_local_gpus
from elfs_ray.stages.training.estimate import measure_training
from elfs_ray.storage import filesystem, schema

NUM_SAMPLED = 16  # images, as many as an encoder sees at once here
STEP_PASSES = 3  # forward passes take as long as one step of training
NUM_BUFFERS = 4  # copies of a block's pixels on their way through a worker


def estimate(work: Work) -> Estimate:
    """Return what it takes to embed all samples. Raises RuntimeError or ValueError where it cannot be measured."""
    config, devices = work.config, work.devices
    request = request_encoders(config, devices)
    if request.gpus:
        require_local_gpus()
    if config.pretrains:
        return _estimate_own_encoder(work, request)
    images = sample_images(work)
    measured = in_worker(measure, config, images, request.device)
    decode, encode = measured["decode"], measured["encode"]
    if request.gpus:
        rate = min(decode * max(1, devices.num_cpus), encode * request.most)
        basis = f"measured here: {encode:,.0f} images/s a GPU, decoding {decode:,.0f} a CPU"
    else:
        a_worker = 1 / (1 / decode + 1 / encode)
        rate, basis = a_worker * request.most, f"measured here: {a_worker:,.3g} images/s a CPU"
    memory = measured["peak_bytes"] + NUM_BUFFERS * BLOCK_PIXEL_BYTES
    return Estimate(work.num_samples / rate, memory, basis, measured["dim"])


def _estimate_own_encoder(work: Work, request: Request) -> Estimate:
    """Return what it takes to embed with the encoder that the run trains: a forward pass of its network."""
    size = work.config.pretrain.image_size or work.config.embed.proxy_image_size
    network = simclr_settings(vars(work.config.pretrain), size).network
    rate, memory = measure_training(request, network, size)
    return Estimate(work.num_samples / (STEP_PASSES * rate), memory, dim=build_backbone(network)[1])


def sample_images(work: Work) -> list[bytes]:
    """Return the bytes of some images of the pool that can be read."""
    pool = work.config.pool
    files = work.run_dir.table_files(schema.INDEX)
    columns = PoolColumns(pool.image_column)
    if files:
        uris = next(work.run_dir.read_table(schema.INDEX, columns=[schema.URI]))[schema.URI][:NUM_SAMPLED].to_pylist()
    else:
        uris = list_unit(find_units(pool.uri, pool.format)[0], columns)[schema.URI][:NUM_SAMPLED].to_pylist()
    images = [data for data in read_images(uris, columns) if not isinstance(data, BadImage)]
    if not images:
        raise RuntimeError("none of the first images can be read")
    return images


def measure(config: Config, images: list[bytes], device: str) -> dict[str, Any]:
    """Return decoded and encoded images a second of one thread or GPU, the embedding's dimension and peak memory."""
    torch.set_num_threads(1)
    embed = config.embed
    # An untrained network takes as long as a trained one, and needs no download.
    weights = embed.weights if embed.weights is not None or is_fetched(embed.encoder) else "random:0"
    file = embed.weights_file
    with filesystem.local_file(file) if file is not None else nullcontext(weights) as weights:
        shape = encoder_input(embed.encoder, embed.image_size, embed.resize, weights)
        encoder = load_encoder(
            embed.encoder,
            weights=weights,
            image_size=embed.image_size,
            device=device,
            runtime=embed.runtime,
            precision=embed.precision,
        )
    pixels: list[np.ndarray] = []

    def decode(number: int) -> None:
        pixels[:] = [view for data in images[:number] if (view := _decode(config, shape, data)) is not None]

    decode_rate = rate_of(decode, len(images))
    if not pixels:
        raise RuntimeError("none of the first images can be decoded")
    # OpenVINO always computes whole batches: fewer images would take as long.
    step = OPENVINO_BATCH if embed.runtime == OPENVINO else 1
    most = max(2, embed.batch_size // step)
    batch = np.stack([pixels[position % len(pixels)] for position in range(most * step)])
    encode_rate = step * rate_of(lambda number: encoder.encode(batch[: number * step]), most)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"decode": decode_rate, "encode": encode_rate, "dim": encoder.dim, "peak_bytes": peak}


def _decode(config: Config, shape: EncoderInput, data: bytes) -> np.ndarray | None:
    """Return the encoder's view of an image, and make its copy where the run keeps one; None for a bad image."""
    embed = config.embed
    try:
        min_size = max(shape.resize, embed.proxy_image_size)
        image = decode_image(data, max_pixels=embed.max_image_pixels, min_size=min_size)
        if config.keeps_copies:
            encode_proxy_image(image, short_side=embed.proxy_image_size, jpeg_quality=embed.proxy_jpeg_quality)
    except BadImage:
        return None
    return resize_center_crop(image, resize=shape.resize, crop=shape.crop, interpolation=shape.interpolation)
