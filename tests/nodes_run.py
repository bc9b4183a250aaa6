"""Three nodes of Ray on one machine, one of which is lost in every stage: run by test_cluster_nodes.py.

    python tests/nodes_run.py FOLDER key=value ...

runs the pipeline into FOLDER/one on a head and one node, then into FOLDER/three on a head and two nodes. There, as soon
as a stage has begun, a node is taken away without notice and another one is added. The head has no CPUs.
"""

import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from elfs_ray import pipeline
from elfs_ray.config import Config, load_config
from elfs_ray.ray_runtime import connect

JOB = Path(__file__).parents[1] / "jobs" / "cifar10.yaml"
NODE_CPUS = 4
STAGES = ("index", "embed", "cluster", "train", "select", "report")
# What shows that work of a stage is under way, in the run directory; the marker is written before any work.
BEGUN = {"embed": "embeddings/*.parquet", "train": "dynamics/epoch=001/*.parquet"}


class Nodes:
    """A head and nodes beside it."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(shutdown_at_exit=True)
        self._cluster.add_node(num_cpus=0, temp_dir=str(folder), include_dashboard=False)
        self._nodes: list = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=200 << 20))

    def lose(self) -> None:
        """Kill the oldest node's processes."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def end(self) -> None:
        self._cluster.shutdown()


def lose_a_node(nodes: Nodes, run_dir: Path, stage: str) -> None:
    """Wait until a stage is at work, take a node away, add one."""
    pattern = BEGUN.get(stage, f"{stage}/_STARTED.json")
    while not list(run_dir.glob(pattern)):
        time.sleep(0.01)
    finished = (run_dir / stage / "_SUCCESS.json").exists()
    nodes.lose()
    print(f"lost {stage} {'too late' if finished else 'in time'}", flush=True)
    nodes.add()


def config_of(run_dir: Path, overrides: list[str], until: str = "report") -> Config:
    return load_config(JOB, [*overrides, f"run_dir={run_dir}", f"until={until}"])


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    nodes = Nodes(folder / "ray")
    try:
        nodes.add()
        connect(nodes.address)
        pipeline.run(config_of(folder / "one", overrides))
        nodes.add()
        for stage in STAGES:
            loser = threading.Thread(target=lose_a_node, args=(nodes, folder / "three", stage), daemon=True)
            if stage != "report":  # the driver's own work
                loser.start()
            pipeline.run(config_of(folder / "three", overrides, until=stage))
            if stage != "report":
                loser.join(120)
    finally:
        nodes.end()


if __name__ == "__main__":
    main()
