"""Stream blocks through the encoders of stage embed by Ray Data.

If the encoders have GPUs, tasks on CPUs decode, so that decoding and encoding scale apart; encoders on CPUs decode
their own blocks.
"""

import logging
from collections.abc import Iterable
from typing import Any

import ray.data

from elfs_ray.runtime.cluster import num_cpus
from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.resources import GIB, Request
from elfs_ray.stages.embed.blocks import blocks_a_turn
from elfs_ray.stages.embed.worker import DecodeAndEncodeBlock, EmbedJob, EncodeBlock, read_block

MAX_INPUT_BLOCKS = 4096  # the driver keeps an account of each of Ray Data's blocks


def stream(job: EmbedJob, blocks: list[tuple[int, int]], request: Request) -> Iterable[dict[str, Any]]:
    """Run the blocks through Ray Data; yield the summary of each block when it is written."""
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
    decode: Any = read_block
    decoded = dataset.map_batches(decode, batch_size=1, num_cpus=1, fn_kwargs={"job": job}, **placement())
    encode: Any = EncodeBlock
    return decoded.map_batches(encode, batch_size=1, fn_constructor_args=(job, "cuda"), **encoder_pool)


def _embed_on_cpus(dataset: ray.data.Dataset, job: EmbedJob, encoder_pool: dict[str, Any]) -> ray.data.Dataset:
    """Decode and embed in one encoder for each CPU: no pixels cross the object store, and no CPU waits for another."""
    encode: Any = DecodeAndEncodeBlock
    return dataset.map_batches(encode, batch_size=1, fn_constructor_args=(job, "cpu"), **encoder_pool)
