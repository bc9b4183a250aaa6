"""embed: compute a unit-length vector for every image, and a small copy of it for the proxy network.

Reads   index/, the pool's images
Writes  embeddings/, proxy_images/, rejected/, one file of each for a block of ids

Ray Data streams blocks of ids (ray_stream.py), or threads take them in a run without Ray. The images of a block are
read and decoded once for both tables, and a pool of encoders embeds them (worker.py). An image that cannot be used
becomes a row in rejected/. A resumed run skips the blocks that are done, and a retried block overwrites its own files.

If this run trains its own encoder (stages copy and pretrain), proxy_images/ exists already. Its images are embedded,
and nothing is decoded at full size again.
"""

import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from elfs_ray.config import Config
from elfs_ray.methods.encoders.encoder import describe_weights, fetch_weights
from elfs_ray.runtime.cluster import devices_of_cluster, num_cpus
from elfs_ray.runtime.metrics import report_rejected
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.runtime.threads import run_in_threads
from elfs_ray.stages.embed import EmbedResult, request_encoders
from elfs_ray.stages.embed.blocks import rows_by_file, say_own_range
from elfs_ray.stages.embed.clock import Clock, describe_shares
from elfs_ray.stages.embed.worker import DecodeAndEncodeBlock, EmbedJob, load, make_job, weights_of
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir


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
        with weights_of(config, run_dir) as weights:
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


def _stream(job: EmbedJob, blocks: list[tuple[int, int]]) -> Iterable[dict[str, Any]]:
    """Embed the blocks; yield the summary of each when it is written."""
    request = request_encoders(job.config, devices_of_cluster())
    if not ray.is_initialized():
        room = max(request.fewest, num_cpus() // request.cpus)
        return _stream_in_threads(job, blocks, min(request.most, room, len(blocks)))
    # Imported only now: the import takes two seconds.
    from elfs_ray.stages.embed.ray_stream import stream

    return stream(job, blocks, request)


def _stream_in_threads(job: EmbedJob, blocks: list[tuple[int, int]], num_threads: int) -> Iterator[dict[str, Any]]:
    """Embed the blocks in threads of this process, which share an encoder."""
    encoder = load(job, "cpu", num_threads)
    workers = threading.local()

    def embed(first: int, last: int) -> dict[str, Any]:
        if not hasattr(workers, "of_thread"):
            workers.of_thread = DecodeAndEncodeBlock(job, "cpu", encoder)
        summary = workers.of_thread({"first": [first], "last": [last]})
        return {name: values[0] for name, values in summary.items()}

    for _, summary in run_in_threads(embed, blocks, num_threads):
        yield summary


def _count_embeddings(config: Config, run_dir: RunDir, num_samples: int) -> EmbedResult:
    rows, rejected = (sum(rows_by_file(run_dir, table).values()) for table in (schema.EMBEDDINGS, schema.REJECTED))
    assert rows + rejected == num_samples, (rows, rejected, num_samples)
    if rows == 0:
        reasons = next(run_dir.read_table(schema.REJECTED))[schema.REASON].unique().to_pylist()
        raise RuntimeError(f"none of the {num_samples} images could be embedded: {'; '.join(reasons[:3])}")
    dim = filesystem.read_schema(run_dir.table_files(schema.EMBEDDINGS)[0]).field(schema.EMBEDDING).type.list_size
    return EmbedResult(rows, rejected, dim, _describe_weights_file(config))
