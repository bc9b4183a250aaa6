"""How far an autoscaling Ray cluster can grow: what its autoscaler was told, where this machine can see that.

`ray up` and `ray start --autoscaling-config` run the autoscaler on the head, where drivers run, too; its file says
which nodes it may add. KubeRay's runs in a container of its own: that it is there can be told, not how far it may go.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_OPTION = b"--autoscaling-config="


@dataclass(frozen=True)
class Growth:
    """What a cluster can have in all, and the largest node that it can add; None where that is not known."""

    num_cpus: int | None = None
    num_gpus: int | None = None
    node_cpus: int | None = None
    node_memory_bytes: int | None = None


def find_growth(gcs_address: str) -> Growth | None:
    """The growth of the cluster whose address is given, as seen from a driver; None for one of fixed size."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        paths = [word.removeprefix(_OPTION) for word in words if word.startswith(_OPTION)]
        if paths and f"--gcs-address={gcs_address}".encode() in words:
            return _read_growth(os.path.expanduser(os.fsdecode(paths[0])))
    # KubeRay tells its head to leave the autoscaling to the container beside it.
    if "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", ""):
        return Growth()
    return None


def _read_growth(path: str) -> Growth:
    try:
        return growth_of(yaml.safe_load(Path(path).read_text()))
    except OSError:  # another user's, or gone: there is an autoscaler all the same
        return Growth()


def growth_of(launcher: Mapping[str, Any]) -> Growth:
    """The growth that a cluster launcher's file allows."""
    head = launcher["available_node_types"][launcher["head_node_type"]]
    workers = [node for name, node in launcher["available_node_types"].items() if name != launcher["head_node_type"]]
    in_all = int(launcher["max_workers"])
    if not all(node.get("resources") for node in workers):
        return Growth()

    def most(resource: str) -> int:
        total, left = int(head.get("resources", {}).get(resource, 0)), in_all
        for node in sorted(workers, key=lambda node: -node["resources"].get(resource, 0)):
            number = min(left, int(node.get("max_workers", in_all)))
            total, left = total + number * int(node["resources"].get(resource, 0)), left - number
        return total

    memory = [node["resources"].get("memory") for node in workers]
    return Growth(
        num_cpus=most("CPU"),
        num_gpus=most("GPU"),
        node_cpus=max((int(node["resources"].get("CPU", 0)) for node in workers), default=0),
        node_memory_bytes=None if None in memory or not memory else max(memory),
    )
