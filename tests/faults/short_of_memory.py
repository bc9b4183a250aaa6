"""List and embed a pool while a worker takes more memory than Ray has left; print the outcome.

Arguments: the pool, the run directory, and which worker is greedy: "encoder once" or "task always".
"""

import sys
import time
from pathlib import Path
from typing import Any

from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.embed import ray_stream, worker
from elfs_ray.stages.embed import run as embed
from elfs_ray.stages.index import run as index
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, mark

SPARE_BYTES = 3 << 29  # that may still be taken before Ray kills workers
MAX_HOARD_BYTES = 3 << 30
PIECE_BYTES = 64 << 20


def main(pool: Path, folder: Path, greedy: str) -> None:
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(memory[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    threshold = (total - available + SPARE_BYTES) / total
    system_config = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 50}
    connect("local", num_cpus=1, object_store_memory=100 << 20, _system_config=system_config)
    if greedy == "task always":
        for _ in run_tasks(hoard, [(folder / "flag",)]):
            pass
        return
    config = digits_config(folder, f"pool.uri={pool}", "embed.image_size=8", "embed.block_images=10")
    run_dir = RunDir(folder)
    mark(run_dir, index.run_index(config, run_dir))
    flag = folder / "hoarded"

    class GreedyOnce(worker.DecodeAndEncodeBlock):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if not flag.exists():
                flag.touch()
                hoard(flag)
            return super().__call__(batch)

    ray_stream.DecodeAndEncodeBlock = GreedyOnce  # type: ignore[misc]
    embed.run_embed(config, run_dir)
    print("embedded after the encoder was killed" if flag.exists() else "no encoder took too much memory")


def hoard(flag: Path) -> None:
    """Take memory until Ray ends this process."""
    with flag.open("a") as count:
        count.write("x")
    pieces = []
    while len(pieces) * PIECE_BYTES < MAX_HOARD_BYTES:
        pieces.append(b"\1" * PIECE_BYTES)
        time.sleep(0.05)
    time.sleep(5)
    raise AssertionError("Ray did not kill a worker that took too much memory")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
