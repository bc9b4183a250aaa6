"""copy: make a small copy of every image, in runs that train an encoder before they embed.

Reads   index/, the pool's images
Writes  proxy_images/, copy/rejected/ (embed takes it over into rejected/), one file of each for a block of ids

Only this stage decodes the pool at full size: stage pretrain learns from the copies, and stage embed embeds them. A run
without pretraining has no stage copy, and embed writes proxy_images/ while it decodes.
"""

from typing import Any

from elfs_ray.config import Config
from elfs_ray.pool.images import has_own_range
from elfs_ray.runtime.cluster import num_cpus
from elfs_ray.runtime.metrics import report_rejected
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.copy import CopyResult
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
from elfs_ray.stages.embed.clock import Clock
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


def run_copy(config: Config, run_dir: RunDir) -> CopyResult:
    """Write proxy_images/. Raises RuntimeError if no image could be copied."""
    index = IndexResult.read(run_dir)
    num_samples = index.rows
    blocks = blocks_of(index, config.embed.block_images, config.embed.proxy_image_size)
    copied, rejected = rows_by_file(run_dir, schema.PROXY_IMAGES), rows_by_file(run_dir, "copy", schema.REJECTED)
    names = {block: schema.range_file(*block) for block in blocks}
    pending = [
        block
        for block, name in names.items()
        if copied.get(name, -1) + rejected.get(name, 0) != block[1] - block[0] + 1
    ]
    num_done = num_samples - sum(last - first + 1 for first, last in pending)
    with Progress("copy", num_samples, "images", done=num_done) as progress:
        num_rejected = num_own_range = 0
        step = blocks_a_turn(config, run_dir, pending, num_cpus())
        turns = [pending[start : start + step] for start in range(0, len(pending), step)]
        for position, (added, own_range) in run_tasks(_copy_blocks, [(config, run_dir, turn) for turn in turns]):
            num_rejected += added
            num_own_range += own_range
            report_rejected(num_rejected)
            num_images = sum(last - first + 1 for first, last in turns[position])
            progress.advance(num_images, f"{num_rejected:,} rejected" if num_rejected else "")
    say_own_range("copy", num_own_range)
    return _count_copies(run_dir, num_samples)


def _copy_blocks(config: Config, run_dir: RunDir, blocks: list[tuple[int, int]]) -> tuple[int, int]:
    """Write the copies of some blocks. Return the same as `_copy_block`, of all."""
    counts = [_copy_block(config, run_dir, *block) for block in blocks]
    return sum(rejected for rejected, _ in counts), sum(own_range for _, own_range in counts)


def _copy_block(config: Config, run_dir: RunDir, first: int, last: int) -> tuple[int, int]:
    """Write the copies of one block. Return the number of images rejected, and of those shown in their own range."""
    name = schema.range_file(first, last)
    sample_ids: list[int] = []
    copies: list[bytes] = []
    rejected: list[dict[str, Any]] = []
    own_range = 0
    images = copy_images(config, run_dir, first, last, stage="copy", rejected=rejected, clock=Clock())
    for sample_id, image, copy in images:
        sample_ids.append(sample_id)
        copies.append(copy)
        own_range += has_own_range(image)
    write_rejected(rejected_by_copy(run_dir, name), rejected)
    # Last: a file in proxy_images/ means that its block is done.
    write_proxy_images(run_dir, name, sample_ids, copies)
    return len(rejected), own_range


def _count_copies(run_dir: RunDir, num_samples: int) -> CopyResult:
    rows = sum(rows_by_file(run_dir, schema.PROXY_IMAGES).values())
    rejected = sum(rows_by_file(run_dir, "copy", schema.REJECTED).values())
    assert rows + rejected == num_samples, (rows, rejected, num_samples)
    if rows == 0:
        reasons = next(run_dir.read_table("copy", schema.REJECTED))[schema.REASON].unique().to_pylist()
        raise RuntimeError(f"none of the {num_samples} images could be decoded: {'; '.join(reasons[:3])}")
    return CopyResult(rows, rejected)
