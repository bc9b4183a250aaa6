"""The workers of stage embed: decode a block of images, embed it, write its files.

A worker is an encoder. On a GPU it gets pixels that tasks on CPUs have decoded; on a CPU it decodes its own blocks.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from elfs_ray.config import Config
from elfs_ray.methods.encoders.encoder import Encoder, EncoderInput, encoder_input, load_encoder, to_unit_float16
from elfs_ray.methods.encoders.openvino_runtime import BATCH_SIZE as OPENVINO_BATCH
from elfs_ray.methods.encoders.processor import OPENVINO
from elfs_ray.pool.images import describe_bad_copy, has_own_range, open_proxy_image, resize_center_crop
from elfs_ray.stages.embed.blocks import blocks_of, copy_images, rejected_by_copy, write_proxy_images, write_rejected
from elfs_ray.stages.embed.clock import ENCODE, READ, RESIZE, WAIT, WRITE, Clock
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

UNUSABLE = "its embedding is zero or not finite"


@dataclass(frozen=True)
class EmbedJob:
    """The inputs of every task and encoder; `shape` describes the encoder's input images."""

    config: Config
    run_dir: RunDir
    shape: EncoderInput

    def blocks(self, index: IndexResult) -> list[tuple[int, int]]:
        """Return the (first, last) id of each block; if stage copy has run, these are its blocks."""
        embed = self.config.embed
        side = embed.proxy_image_size if self.config.pretrains else self.shape.crop
        return blocks_of(index, embed.block_images, side)


def make_job(config: Config, run_dir: RunDir) -> EmbedJob:
    """Return the job of a config."""
    embed = config.embed
    with weights_of(config, run_dir) as weights:
        shape = encoder_input(embed.encoder, embed.image_size, embed.resize, weights)
    return EmbedJob(config, run_dir, shape)


@contextlib.contextmanager
def weights_of(config: Config, run_dir: RunDir) -> Iterator[str | None]:
    """Yield the weights to load, with a file on this machine: the config's, or those that stage pretrain wrote."""
    file = run_dir.path("pretrain", schema.ENCODER_FILE) if config.pretrains else config.embed.weights_file
    with filesystem.local_file(file) if file is not None else contextlib.nullcontext(config.embed.weights) as weights:
        yield weights


def load(job: EmbedJob, device: str, num_threads: int = 1) -> Encoder:
    """Return the encoder of a job, for `num_threads` threads that call it at once."""
    embed = job.config.embed
    with weights_of(job.config, job.run_dir) as weights:
        return load_encoder(
            embed.encoder,
            weights=weights,
            weights_sha256=embed.weights_sha256,
            image_size=embed.image_size,
            device=device,
            runtime=embed.runtime,
            precision=embed.precision,
            num_threads=num_threads,
        )


def decode_block(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
    """Read and decode one block and write its proxy images; return its pixels and its rejected images."""
    torch.set_num_threads(1)  # a task has one CPU; threads of several tasks would only take turns
    first, last = int(batch["first"][0]), int(batch["last"][0])
    shape = job.shape
    sample_ids, pixels, copies = [], [], []
    rejected: list[dict[str, Any]] = []
    own_range = 0
    clock = Clock()
    images = copy_images(
        job.config, job.run_dir, first, last, stage="embed", rejected=rejected, clock=clock, min_size=shape.resize
    )
    for sample_id, image, copy in images:
        sample_ids.append(sample_id)
        pixels.append(_pixels(image, shape))
        copies.append(copy)
        own_range += has_own_range(image)
        clock.lap(RESIZE)
    if job.config.keeps_copies:
        write_proxy_images(job.run_dir, schema.range_file(first, last), sample_ids, copies)
        clock.lap(WRITE)
    return _pack(first, last, shape.crop, sample_ids, pixels, rejected, clock, own_range)


def read_copies(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
    """Return the pixels of one block's copies and the images that stage copy rejected."""
    torch.set_num_threads(1)
    first, last = int(batch["first"][0]), int(batch["last"][0])
    name, shape = schema.range_file(first, last), job.shape
    path = job.run_dir.path(schema.PROXY_IMAGES, name)
    copies = filesystem.read_table(path)
    sample_ids = copies[schema.SAMPLE_ID].to_pylist()
    pixels = []
    clock = Clock()
    for sample_id, copy in zip(sample_ids, copies[schema.IMAGE], strict=True):
        try:
            image = open_proxy_image(copy.as_py())
        except Exception as error:  # Pillow's decoders raise many kinds for a broken image, as in decode_image
            raise ValueError(describe_bad_copy(sample_id, path, error)) from error
        clock.lap(READ)
        pixels.append(_pixels(image, shape))
        clock.lap(RESIZE)
    path = rejected_by_copy(job.run_dir, name)
    rejected = filesystem.read_table(path).to_pylist() if filesystem.exists(path) else []
    return _pack(first, last, shape.crop, sample_ids, pixels, rejected, clock)


def _pixels(image: Image.Image, shape: EncoderInput) -> np.ndarray:
    """Return the encoder's view of an image, (side, side, 3) uint8."""
    return resize_center_crop(image, resize=shape.resize, crop=shape.crop, interpolation=shape.interpolation)


def read_block(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
    """Return the pixels of one block, decoded from the pool or from its copies."""
    return read_copies(batch, job) if job.config.pretrains else decode_block(batch, job)


def _pack(
    first: int,
    last: int,
    side: int,
    sample_ids: list[int],
    pixels: list[np.ndarray],
    rejected: list[dict[str, Any]],
    clock: Clock,
    own_range: int = 0,
) -> dict[str, Any]:
    """Return a block as one row of bytes and JSON, which has the same schema for every block."""
    images = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
    return {
        "first": [first],
        "last": [last],
        "sample_ids": [np.array(sample_ids, np.int64).tobytes()],
        "side": [side],
        "pixels": [images.tobytes()],
        "rejected": [json.dumps(rejected)],
        "own_range": [own_range],
        "seconds": [json.dumps(clock.seconds)],
    }


class EncodeBlock:
    """An encoder in an actor: embeds blocks and writes their embeddings and rejected images."""

    def __init__(self, job: EmbedJob, device: str, encoder: Encoder | None = None):
        """Load the encoder, unless the worker is to share one with others."""
        torch.set_num_threads(1)
        self._job, embed = job, job.config.embed
        self._batch_size = OPENVINO_BATCH if embed.runtime == OPENVINO else embed.batch_size
        self._encoder = encoder or load(job, device)
        self._clock = Clock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._clock.lap(WAIT)
        run_dir = self._job.run_dir
        first, last, side = (int(batch[key][0]) for key in ("first", "last", "side"))
        sample_ids = np.frombuffer(batch["sample_ids"][0], np.int64)
        images = np.frombuffer(batch["pixels"][0], np.uint8).reshape(len(sample_ids), side, side, 3)
        rejected = json.loads(batch["rejected"][0])
        starts = range(0, len(images), self._batch_size)
        parts = [self._encoder.encode(images[start : start + self._batch_size]) for start in starts]
        features = np.concatenate(parts) if parts else np.empty((0, self._encoder.dim), np.float32)
        embeddings, usable = to_unit_float16(features)
        self._clock.lap(ENCODE)

        if not usable.all():
            uris = run_dir.read_rows(schema.INDEX, sample_ids[~usable], [schema.URI])[schema.URI].to_pylist()
            one_colour = self._encoder.name == "pixels"
            reason = "one colour alone, in which pixels differ from nothing" if one_colour else UNUSABLE
            rejected += [
                {"sample_id": int(sample_id), "uri": uri, "stage": "embed", "reason": reason}
                for sample_id, uri in zip(sample_ids[~usable], uris, strict=True)
            ]
        name = schema.range_file(first, last)
        write_rejected(run_dir.path(schema.REJECTED, name), rejected)
        # Last of the block's files: a file in embeddings/ means that the block is done.
        _write_embeddings(run_dir.path(schema.EMBEDDINGS, name), sample_ids[usable], embeddings[usable])
        self._clock.lap(WRITE)
        self._clock.add(json.loads(batch["seconds"][0]))  # of decoding, elsewhere or in a subclass
        summary = {"rows": [last - first + 1], "rejected": [len(rejected)], "own_range": batch["own_range"]}
        return summary | {"seconds": [json.dumps(self._clock.take())]}


class DecodeAndEncodeBlock(EncodeBlock):
    """An encoder that also decodes its blocks."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._clock.lap(WAIT)
        decoded = read_block(batch, self._job)
        self._clock.skip()  # it has measured itself
        return super().__call__(decoded)


def _write_embeddings(path: str, sample_ids: np.ndarray, embeddings: np.ndarray) -> None:
    columns = [pa.array(sample_ids), schema.matrix_column(embeddings)]
    filesystem.write_table(path, pa.table(columns, schema=schema.embeddings_schema(embeddings.shape[1])))
