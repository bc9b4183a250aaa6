"""Stage embed without Ray Data, for tests of what becomes of each image: no process has to start for it."""

from elfs_ray.config import Config
from elfs_ray.stages.embed import run as embed
from elfs_ray.stages.embed import worker
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage.run_dir import RunDir


def embed_in_this_process(config: Config, run_dir: RunDir) -> None:
    """Embed every block that is left, one after the other, by the code that the encoders on CPUs run."""
    job = worker.make_job(config, run_dir)
    blocks = job.blocks(IndexResult.read(run_dir))
    encoder = worker.DecodeAndEncodeBlock(job, "cpu")
    for first, last in embed.pending_blocks(run_dir, blocks, keeps_copies=config.keeps_copies):
        encoder({"first": [first], "last": [last]})
