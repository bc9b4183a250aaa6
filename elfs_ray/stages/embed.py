"""embed: a unit-length vector for every image, and a small copy for the proxy network.

Reads   index/, the pool's images
Writes  embeddings/, proxy_images/, rejected/, one file of each for a block of ids

Ray Data streams blocks of ids: the images of a block are read, decoded and resized once for both tables, and embedded
by an actor pool of encoders. Beside GPUs, CPU tasks decode and a block crosses the object store as one row of uint8
pixels, so that the two scale apart; encoders on CPUs decode for themselves. A block's embeddings are written last, so
that a file in embeddings/ means a block that is done: a resumed run skips it, a re-tried block overwrites itself. An
image that cannot be used is a row in rejected/.
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from elfs_ray.config import Config, EmbedConfig
from elfs_ray.methods.encoders import encoder_input, load_encoder, to_unit_float16
from elfs_ray.progress import Progress, say
from elfs_ray.ray_runtime import num_cpus, num_gpus, resolve_device
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.images import BadImage, decode_image, encode_proxy_image, resize_center_crop
from elfs_ray.storage.pool import PoolColumns, read_images
from elfs_ray.storage.run_dir import RunDir

BLOCK_PIXEL_BYTES = 64 << 20
MAX_BLOCK_IMAGES = 8192
PROXY_GROUP_BYTES = 1 << 20  # of proxy images in a row group, the unit in which streamed training reads
MIN_BLOCKS = 16
MIN_BLOCK_IMAGES = 64
MAX_INPUT_BLOCKS = 4096
FOOTER_THREADS = 32


def run_embed(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Embed the pool. Returns rows, rejected, dim. Raises RuntimeError when no image could be embedded."""
    num_samples = int(run_dir.figures("index")["rows"])
    blocks = _plan_blocks(config.embed, num_samples)
    pending = _pending_blocks(run_dir, blocks)
    num_done = num_samples - sum(last - first + 1 for first, last in pending)
    if 0 < num_done < num_samples:
        say(f"embed: {num_done:,} images were embedded by an earlier run")

    rejected = 0
    with Progress("embed", num_samples, "images", done=num_done) as progress:
        for summary in _stream(config, run_dir, pending) if pending else ():
            rejected += summary["rejected"]
            progress.advance(summary["rows"], f"{rejected:,} rejected" if rejected else "")
    return _closing_figures(run_dir, num_samples)


def _plan_blocks(config: EmbedConfig, num_samples: int) -> list[tuple[int, int]]:
    """(first, last) id of each block: a function of the config and the pool's size alone, as file names are."""
    rows = config.block_images
    if rows is None:
        crop = encoder_input(config.encoder, config.image_size, config.resize).crop
        rows = min(BLOCK_PIXEL_BYTES // (3 * crop * crop), MAX_BLOCK_IMAGES, -(-num_samples // MIN_BLOCKS))
        rows = max(rows, MIN_BLOCK_IMAGES)
    return [(first, min(first + rows, num_samples) - 1) for first in range(0, num_samples, rows)]


def _pending_blocks(run_dir: RunDir, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks of which an image is neither embedded nor rejected, or whose proxy images are not there."""
    embedded, rejected = (_rows_by_file(run_dir, table) for table in (schema.EMBEDDINGS, schema.REJECTED))
    copied = {path.rsplit("/", 1)[1] for path in run_dir.table_files(schema.PROXY_IMAGES)}

    def is_done(first: int, last: int) -> bool:
        name = schema.range_file(first, last)
        return name in copied and embedded.get(name, -1) + rejected.get(name, 0) == last - first + 1

    return [block for block in blocks if not is_done(*block)]


def _rows_by_file(run_dir: RunDir, table: str) -> dict[str, int]:
    """The rows of each file of a table, from their footers."""
    paths = run_dir.table_files(table)
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        counts = list(threads.map(filesystem.num_rows, paths))
    return {path.rsplit("/", 1)[1]: count for path, count in zip(paths, counts, strict=True)}


def _stream(config: Config, run_dir: RunDir, blocks: list[tuple[int, int]]):
    """Run the blocks through Ray Data; yields each block's row counts as it is written."""
    device = resolve_device(config.embed.device, "embed.device")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing ray.data has set it to INFO
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"first": first, "last": last} for first, last in blocks]
    todo = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_INPUT_BLOCKS))
    # An encoder without a block to embed would be loaded for nothing.
    num_encoders = min(config.embed.num_workers or (num_gpus() if device == "cuda" else num_cpus()), len(blocks))
    embed = _embed_on_gpus if device == "cuda" else _embed_on_cpus
    return embed(todo, config, run_dir, num_encoders).iter_rows()


def _embed_on_gpus(dataset: ray.data.Dataset, config: Config, run_dir: RunDir, num_encoders: int) -> ray.data.Dataset:
    """CPU tasks decode, one encoder a GPU embeds."""
    decode: Any = _decode_block
    decoded = dataset.map_batches(decode, batch_size=1, num_cpus=1, fn_kwargs={"config": config, "run_dir": run_dir})
    return decoded.map_batches(
        _EncodeBlock,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_encoders),
        num_gpus=1,
        fn_constructor_args=(config, run_dir, "cuda"),
    )


def _embed_on_cpus(dataset: ray.data.Dataset, config: Config, run_dir: RunDir, num_encoders: int) -> ray.data.Dataset:
    """One encoder a CPU decodes and embeds: nothing crosses the object store, and no CPU waits for another."""
    return dataset.map_batches(
        _DecodeAndEncodeBlock,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_encoders),
        num_cpus=1,
        fn_constructor_args=(config, run_dir, "cpu"),
    )


def _decode_block(batch: dict[str, Any], config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Read and decode one block; write its proxy images; hand on its pixels and the reasons of what is rejected."""
    torch.set_num_threads(1)
    first, last = int(batch["first"][0]), int(batch["last"][0])
    shape = encoder_input(config.embed.encoder, config.embed.image_size, config.embed.resize)
    proxy_size = config.embed.proxy_image_size
    columns = PoolColumns(config.pool.image_column)
    index = run_dir.read_rows(schema.INDEX, np.arange(first, last + 1), [schema.URI])
    uris = index[schema.URI].to_pylist()

    sample_ids, pixels, proxies, rejected = [], [], [], []
    for sample_id, uri, data in zip(range(first, last + 1), uris, read_images(uris, columns), strict=True):
        try:
            if isinstance(data, BadImage):
                raise data
            min_size = max(shape.resize, proxy_size)
            image = decode_image(data, max_pixels=config.embed.max_image_pixels, min_size=min_size)
            square = resize_center_crop(image, resize=shape.resize, crop=shape.crop, interpolation=shape.interpolation)
            proxy = encode_proxy_image(image, short_side=proxy_size, jpeg_quality=config.embed.proxy_jpeg_quality)
        except BadImage as error:
            rejected.append({"sample_id": sample_id, "uri": uri, "reason": str(error)})
            continue
        sample_ids.append(sample_id)
        pixels.append(square)
        proxies.append(proxy)

    table = pa.table([sample_ids, proxies], schema=schema.PROXY_IMAGES_SCHEMA)
    rows_per_group = max(1, PROXY_GROUP_BYTES * len(proxies) // max(1, sum(map(len, proxies))))
    filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, schema.range_file(first, last)), table, rows_per_group)
    images = np.stack(pixels) if pixels else np.empty((0, shape.crop, shape.crop, 3), np.uint8)
    return {
        "first": [first],
        "last": [last],
        "sample_ids": [np.array(sample_ids, np.int64).tobytes()],
        "side": [shape.crop],
        "pixels": [images.tobytes()],
        "rejected": [json.dumps(rejected)],
    }


class _EncodeBlock:
    """An encoder held by an actor: embeds a block and writes what it gives."""

    def __init__(self, config: Config, run_dir: RunDir, device: str):
        torch.set_num_threads(1)
        self._config, self._run_dir = config, run_dir
        self._batch_size = config.embed.batch_size
        self._encoder = load_encoder(
            config.embed.encoder,
            weights=config.embed.weights,
            weights_sha256=config.embed.weights_sha256,
            image_size=config.embed.image_size,
            device=device,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        first, last, side = (int(batch[key][0]) for key in ("first", "last", "side"))
        sample_ids = np.frombuffer(batch["sample_ids"][0], np.int64)
        images = np.frombuffer(batch["pixels"][0], np.uint8).reshape(len(sample_ids), side, side, 3)
        rejected = [dict(row, stage="embed") for row in json.loads(batch["rejected"][0])]
        starts = range(0, len(images), self._batch_size)
        parts = [self._encoder.encode(images[start : start + self._batch_size]) for start in starts]
        features = np.concatenate(parts) if parts else np.empty((0, self._encoder.dim), np.float32)
        embeddings, usable = to_unit_float16(features)

        if not usable.all():
            uris = self._run_dir.read_rows(schema.INDEX, sample_ids[~usable], [schema.URI])[schema.URI].to_pylist()
            reason = "its embedding is zero or not finite"
            rejected += [
                {"sample_id": int(sample_id), "uri": uri, "stage": "embed", "reason": reason}
                for sample_id, uri in zip(sample_ids[~usable], uris, strict=True)
            ]
        name = schema.range_file(first, last)
        self._write_rejected(name, rejected)
        _write_embeddings(self._run_dir.path(schema.EMBEDDINGS, name), sample_ids[usable], embeddings[usable])
        return {"rows": [last - first + 1], "rejected": [len(rejected)]}

    def _write_rejected(self, name: str, rejected: list[dict[str, Any]]) -> None:
        path = self._run_dir.path(schema.REJECTED, name)
        if not rejected:
            # An earlier try may have failed to read what can be read now.
            filesystem.delete(path)
            return
        rejected.sort(key=lambda row: row["sample_id"])
        filesystem.write_table(path, pa.Table.from_pylist(rejected, schema=schema.REJECTED_SCHEMA))


class _DecodeAndEncodeBlock(_EncodeBlock):
    """An encoder that decodes its own blocks."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(_decode_block(batch, self._config, self._run_dir))


def _write_embeddings(path: str, sample_ids: np.ndarray, embeddings: np.ndarray) -> None:
    dim = embeddings.shape[1]
    values = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    table = pa.table(
        [pa.array(sample_ids), pa.FixedSizeListArray.from_arrays(values, dim)], schema=schema.embeddings_schema(dim)
    )
    filesystem.write_table(path, table)


def _closing_figures(run_dir: RunDir, num_samples: int) -> dict[str, Any]:
    rows, rejected = (sum(_rows_by_file(run_dir, table).values()) for table in (schema.EMBEDDINGS, schema.REJECTED))
    assert rows + rejected == num_samples, (rows, rejected, num_samples)
    if rows == 0:
        reasons = next(run_dir.read_table(schema.REJECTED))[schema.REASON].unique().to_pylist()
        raise RuntimeError(f"none of the {num_samples} images could be embedded: {'; '.join(reasons[:3])}")
    dim = filesystem.read_schema(run_dir.table_files(schema.EMBEDDINGS)[0]).field(schema.EMBEDDING).type.list_size
    return {"rows": rows, "rejected": rejected, "dim": dim}
