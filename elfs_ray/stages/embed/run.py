"""embed: compute a unit-length vector for every image, and a small copy of it for the proxy network.

Reads   index/, the pool's images
Writes  embeddings/, proxy_images/, rejected/, one file of each for a block of ids

Ray Data streams blocks of ids. The images of a block are read and decoded once for both tables, and a pool of actors
embeds them. If the encoders have GPUs, tasks on CPUs decode, so that decoding and encoding scale apart; encoders on
CPUs decode their own blocks. An image that cannot be used becomes a row in rejected/. A resumed run skips the blocks
that are done, and a retried block overwrites its own files.

If this run trains its own encoder (stages copy and pretrain), proxy_images/ exists already. Its images are embedded,
and nothing is decoded at full size again.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from PIL import Image

from elfs_ray.config import Config
from elfs_ray.methods.encoders.encoder import (
    EncoderInput,
    describe_weights,
    encoder_input,
    fetch_weights,
    load_encoder,
    to_unit_float16,
)
from elfs_ray.methods.encoders.openvino_runtime import BATCH_SIZE as OPENVINO_BATCH
from elfs_ray.methods.encoders.processor import OPENVINO
from elfs_ray.pool.images import describe_bad_copy, has_own_range, open_proxy_image, resize_center_crop
from elfs_ray.runtime.cluster import devices_of_cluster, num_cpus
from elfs_ray.runtime.metrics import report_rejected
from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.runtime.resources import GIB, Request
from elfs_ray.stages.embed import EmbedResult, request_encoders
from elfs_ray.stages.embed.blocks import (
    blocks_a_turn,
    blocks_of,
    copy_images,
    rejected_by_copy,
    rows_by_file,
    say_own_range,
    write_proxy_images,
    write_rejected,
)
from elfs_ray.stages.embed.clock import ENCODE, READ, RESIZE, WAIT, WRITE, Clock, describe_shares
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_INPUT_BLOCKS = 4096  # the driver keeps an account of each of Ray Data's blocks
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


def run_embed(config: Config, run_dir: RunDir) -> EmbedResult:
    """Embed the pool. Raises RuntimeError when no image could be embedded."""
    index = IndexResult.read(run_dir)
    num_samples = index.rows
    job = make_job(config, run_dir)
    pending = pending_blocks(run_dir, job.blocks(index), keeps_copies=config.keeps_copies)
    num_done = num_samples - sum(last - first + 1 for first, last in pending)
    if 0 < num_done < num_samples:
        say(f"embed     {num_done:,} images were embedded by an earlier run")

    if pending:
        with _weights(config, run_dir) as weights:
            # On the driver first: a failed download is one clear error there, and one from each encoder otherwise.
            fetch_weights(config.embed.encoder, weights)
    rejected = own_range = 0
    spent = Clock()
    with Progress("embed", num_samples, "images", done=num_done) as progress:
        for summary in _stream(job, pending) if pending else ():
            rejected += summary["rejected"]
            own_range += summary["own_range"]
            spent.add(json.loads(summary["seconds"]))
            report_rejected(rejected)
            progress.advance(summary["rows"], f"{rejected:,} rejected" if rejected else "")
    say_own_range("embed", own_range)
    if spent.seconds:
        say(f"embed     the workers' time: {describe_shares(spent.seconds)}")
    return _count_embeddings(config, run_dir, num_samples)


def make_job(config: Config, run_dir: RunDir) -> EmbedJob:
    """Return the job of a config."""
    embed = config.embed
    with _weights(config, run_dir) as weights:
        shape = encoder_input(embed.encoder, embed.image_size, embed.resize, weights)
    return EmbedJob(config, run_dir, shape)


@contextlib.contextmanager
def _weights(config: Config, run_dir: RunDir) -> Iterator[str | None]:
    """Yield the weights to load, with a file on this machine: the config's, or those that stage pretrain wrote."""
    file = run_dir.path("pretrain", schema.ENCODER_FILE) if config.pretrains else config.embed.weights_file
    with filesystem.local_file(file) if file is not None else contextlib.nullcontext(config.embed.weights) as weights:
        yield weights


def _describe_weights_file(config: Config) -> dict[str, Any] | None:
    """Return the facts that identify the weights file of the config; None if the config names none."""
    file = config.embed.weights_file
    if file is None:
        return None
    with filesystem.local_file(file) as path:
        return describe_weights(config.embed.encoder, path)


def pending_blocks(run_dir: RunDir, blocks: list[tuple[int, int]], *, keeps_copies: bool) -> list[tuple[int, int]]:
    """Return the blocks with images that are neither embedded nor rejected, or lack a copy in a run that keeps them."""
    tables = (schema.EMBEDDINGS, schema.REJECTED, schema.PROXY_IMAGES)
    embedded, rejected, copied = (rows_by_file(run_dir, table) for table in tables)

    def is_done(first: int, last: int) -> bool:
        name = schema.range_file(first, last)
        num_embedded = embedded.get(name, -1)
        # There may be more copies than embeddings: an image is copied before its embedding turns out to be unusable.
        is_embedded = num_embedded + rejected.get(name, 0) == last - first + 1
        return is_embedded and (not keeps_copies or copied.get(name, -1) >= num_embedded)

    return [block for block in blocks if not is_done(*block)]


def _stream(job: EmbedJob, blocks: list[tuple[int, int]]):
    """Run the blocks through Ray Data; yield the row counts of each block when it is written."""
    config = job.config
    request = request_encoders(config, devices_of_cluster())
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the import of ray.data has set it to INFO
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"first": first, "last": last} for first, last in blocks]
    # Ray Data's blocks are what it schedules and retries, and by default it makes few: one for each turn of a worker.
    num_turns = -(-len(rows) // _blocks_a_turn(job, blocks))
    todo = ray.data.from_items(rows, override_num_blocks=min(num_turns, MAX_INPUT_BLOCKS))
    embed = _embed_on_gpus if request.gpus else _embed_on_cpus
    return embed(todo, job, _encoder_pool(request, len(blocks))).iter_rows()


def _blocks_a_turn(job: EmbedJob, blocks: list[tuple[int, int]]) -> int:
    if job.config.pretrains:  # the encoder reads the copies
        return 1
    return blocks_a_turn(job.config, job.run_dir, blocks, num_cpus())


def _encoder_pool(request: Request, num_blocks: int) -> dict[str, Any]:
    """Return the number of encoders, and what each holds, as options of map_batches."""
    # An encoder without a block to embed would be loaded for nothing.
    fewest, most = min(request.fewest, num_blocks), min(request.most, num_blocks)
    # All are requested at once: an autoscaling cluster grows by what waits, and work begins on the first that comes.
    pool = ray.data.ActorPoolStrategy(min_size=fewest, max_size=most, initial_size=most)
    options: dict[str, Any] = {"compute": pool, "num_cpus": request.cpus, **placement()}
    if request.gpus:
        options["num_gpus"] = request.gpus
    if request.memory_gib:
        options["memory"] = request.memory_gib * GIB
    return options


def _embed_on_gpus(dataset: ray.data.Dataset, job: EmbedJob, encoder_pool: dict[str, Any]) -> ray.data.Dataset:
    """Decode in tasks on CPUs and embed on an encoder for each GPU."""
    decode: Any = _read_block
    decoded = dataset.map_batches(decode, batch_size=1, num_cpus=1, fn_kwargs={"job": job}, **placement())
    encode: Any = _EncodeBlock
    return decoded.map_batches(encode, batch_size=1, fn_constructor_args=(job, "cuda"), **encoder_pool)


def _embed_on_cpus(dataset: ray.data.Dataset, job: EmbedJob, encoder_pool: dict[str, Any]) -> ray.data.Dataset:
    """Decode and embed in one encoder for each CPU: no pixels cross the object store, and no CPU waits for another."""
    encode: Any = _DecodeAndEncodeBlock
    return dataset.map_batches(encode, batch_size=1, fn_constructor_args=(job, "cpu"), **encoder_pool)


def _decode_block(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
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


def _read_copies(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
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


def _read_block(batch: dict[str, Any], job: EmbedJob) -> dict[str, Any]:
    """Return the pixels of one block, decoded from the pool or from its copies."""
    return _read_copies(batch, job) if job.config.pretrains else _decode_block(batch, job)


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


class _EncodeBlock:
    """An encoder in an actor: embeds blocks and writes their embeddings and rejected images."""

    def __init__(self, job: EmbedJob, device: str):
        torch.set_num_threads(1)
        self._job, config = job, job.config
        embed = config.embed
        self._batch_size = OPENVINO_BATCH if embed.runtime == OPENVINO else embed.batch_size
        with _weights(config, job.run_dir) as weights:
            self._encoder = load_encoder(
                embed.encoder,
                weights=weights,
                weights_sha256=embed.weights_sha256,
                image_size=embed.image_size,
                device=device,
                runtime=embed.runtime,
                precision=embed.precision,
            )
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


class _DecodeAndEncodeBlock(_EncodeBlock):
    """An encoder that also decodes its blocks."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._clock.lap(WAIT)
        decoded = _read_block(batch, self._job)
        self._clock.skip()  # it has measured itself
        return super().__call__(decoded)


def _write_embeddings(path: str, sample_ids: np.ndarray, embeddings: np.ndarray) -> None:
    columns = [pa.array(sample_ids), schema.matrix_column(embeddings)]
    filesystem.write_table(path, pa.table(columns, schema=schema.embeddings_schema(embeddings.shape[1])))


def _count_embeddings(config: Config, run_dir: RunDir, num_samples: int) -> EmbedResult:
    rows, rejected = (sum(rows_by_file(run_dir, table).values()) for table in (schema.EMBEDDINGS, schema.REJECTED))
    assert rows + rejected == num_samples, (rows, rejected, num_samples)
    if rows == 0:
        reasons = next(run_dir.read_table(schema.REJECTED))[schema.REASON].unique().to_pylist()
        raise RuntimeError(f"none of the {num_samples} images could be embedded: {'; '.join(reasons[:3])}")
    dim = filesystem.read_schema(run_dir.table_files(schema.EMBEDDINGS)[0]).field(schema.EMBEDDING).type.list_size
    return EmbedResult(rows, rejected, dim, _describe_weights_file(config))
