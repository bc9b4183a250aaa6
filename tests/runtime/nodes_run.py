"""Run the pipeline on several Ray nodes on one machine and lose one in every stage; see test_cluster_nodes.py.

    python tests/runtime/nodes_run.py processes|namespaces FOLDER key=value ...

The pipeline runs into FOLDER/one on a head and one node, then into FOLDER/three on a head and two nodes. In the second
run, as soon as a stage is at work, a node is killed without notice and another one is added. The head has no CPUs.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from elfs_ray.config import Config, ConfigError, load_config
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.presets import preset
from elfs_ray.runtime.cluster import connect

JOB = preset("cifar10")
NODE_CPUS = 4
STAGES = ("index", "embed", "cluster", "train", "select", "report")
# Files that show that a stage is at work. The marker of its start is not enough: it is written before any work.
AT_WORK = {"embed": "embeddings/*.parquet", "train": "dynamics/epoch=001/*.parquet"}
OBJECT_STORE_BYTES = 200 << 20
# Ray then notices within 4 s that a node is cut off; by default it takes much longer.
HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Processes:
    """A head and further nodes, as processes with one address."""

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(shutdown_at_exit=True)
        self._cluster.add_node(num_cpus=0, temp_dir=str(folder), include_dashboard=False)
        self._nodes: list = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=OBJECT_STORE_BYTES))

    def lose(self) -> None:
        """Kill the oldest node's processes."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def end(self) -> None:
        ray.shutdown()  # a node that a driver is connected to is not removed
        self._cluster.shutdown()


class Namespaces:
    """A head and further nodes on a network bridge, each node in its own network namespace."""

    address = "10.77.0.1:6379"

    def __init__(self, folder: Path) -> None:
        self._folder, self._links, self._count = folder, [], 0
        os.environ |= HEALTH_CHECK
        run("mount -t tmpfs none /run")  # in which ip keeps the names of namespaces
        run("ip link set lo up")
        run("ip link add bridge type bridge")
        run("ip address add 10.77.0.1/24 dev bridge")
        run("ip link set bridge up")
        self._start("head", "10.77.0.1", "--head --port=6379 --num-cpus=0 --include-dashboard=false")

    def _start(self, name: str, address: str, options: str, inside: str = "") -> None:
        command = (
            f"{inside} {Path(sys.executable).with_name('ray')} start --block --node-ip-address={address} {options}"
        )
        command += f" --object-store-memory={OBJECT_STORE_BYTES} --temp-dir={self._folder / name}"
        subprocess.Popen(command.split(), stdout=sys.stderr, stderr=sys.stderr)

    def add(self) -> None:
        self._count += 1
        name, address = f"n{self._count}", f"10.77.0.{self._count + 1}"
        run(f"ip netns add {name}")
        run(f"ip link add {name}-out type veth peer name {name}-in netns {name}")
        run(f"ip link set {name}-out master bridge up")
        inside = f"ip netns exec {name}"
        for rest in ("link set lo up", f"address add {address}/24 dev {name}-in", f"link set {name}-in up"):
            run(f"{inside} ip {rest}")
        self._start(name, address, f"--address={self.address} --num-cpus={NODE_CPUS}", inside)
        self._links.append((f"{name}-out", address))
        deadline = time.monotonic() + 60
        while ray.is_initialized() and address not in alive():
            assert time.monotonic() < deadline, f"{address} did not join"
            time.sleep(0.1)

    def lose(self) -> None:
        """Cut off the oldest node, and wait until Ray notices."""
        link, address = self._links.pop(0)
        run(f"ip link set {link} down")
        while address in alive():
            time.sleep(0.1)

    def end(self) -> None:
        """Do nothing: everything ends with the namespaces."""


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def alive() -> set[str]:
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def lose_a_node(nodes: Processes | Namespaces, run_dir: Path, stage: str, work: Future) -> None:
    """Wait until a stage is at work, lose a node and add one."""
    pattern = AT_WORK.get(stage, f"{stage}/_STARTED.json")
    while not list(run_dir.glob(pattern)) and not work.done():
        time.sleep(0.01)
    finished = (run_dir / stage / "_SUCCESS.json").exists()
    nodes.lose()
    print(f"lost {stage} {'too late' if finished else 'in time'}", flush=True)
    nodes.add()


def connect_when_up(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect(address)
        except ConfigError:  # nothing listens there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def config_of(run_dir: Path, overrides: list[str], until: str = "null") -> Config:
    return load_config(JOB, [*overrides, f"run_dir={run_dir}", f"until={until}"])


def main() -> None:
    kind, folder, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    nodes = {"processes": Processes, "namespaces": Namespaces}[kind](folder / "ray")
    try:
        connect_when_up(nodes.address)
        nodes.add()
        pipeline.run(config_of(folder / "one", overrides))
        nodes.add()
        # Ray can start nodes only in the main thread, so the stages run in another one.
        with ThreadPoolExecutor(1) as stages:
            for stage in STAGES:
                work = stages.submit(pipeline.run, config_of(folder / "three", overrides, until=stage))
                if stage != "report":  # the driver's own work
                    lose_a_node(nodes, folder / "three", stage, work)
                work.result()
    finally:
        nodes.end()


if __name__ == "__main__":
    main()
