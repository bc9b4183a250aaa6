"""Train on a cluster that gains a node after the first epoch and loses it later; print the stage's result."""

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from elfs_ray.stages.train import run as train
from elfs_ray.stages.training import ray_train
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config

RESIZE_INTERVAL_S = 2.0
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    ray_train.RESIZE_INTERVAL_S = RESIZE_INTERVAL_S
    config = digits_config(
        folder,
        "train.num_workers=1-2",
        "train.cpus_per_worker=1",
        "train.epochs=200",
        "train.batch_size=16",
        "train.max_failures=3",
    )
    # Ray starts nodes from the main thread only.
    training = ThreadPoolExecutor().submit(train.run_train, config, RunDir(str(folder)))
    _wait_for_workers(folder, 1, training)
    node = cluster.add_node(**NODE)
    _wait_for_report(folder, _wait_for_workers(folder, 2, training))
    cluster.remove_node(node, allow_graceful=False)
    print(json.dumps(training.result().to_json()))
    ray.shutdown()
    cluster.shutdown()


def _wait_for_workers(folder: Path, num_workers: int, training: Future) -> float:
    """Wait for an epoch of so many workers. Returns when it ended."""
    while True:
        for path in sorted(folder.glob("train/history/*.json")):
            if f'"workers": {num_workers}' in path.read_text():
                return path.stat().st_mtime
        assert not training.done(), f"training ended before {num_workers} workers had an epoch: {training.result()}"
        time.sleep(0.1)


def _wait_for_report(folder: Path, since_s: float) -> None:
    """Wait until Ray Train lists a newer checkpoint: an epoch without one would be trained again."""
    while (folder / "train" / "checkpoints" / ray_train.SNAPSHOT_FILE).stat().st_mtime <= since_s:
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
