"""Make, check and describe the requests for workers. What a stage requests is in its stages/<name>/__init__.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from elfs_ray.config import ConfigError, worker_range
from elfs_ray.runtime.progress import count

if TYPE_CHECKING:  # importing it imports Ray, and --help reads this module
    from elfs_ray.runtime.cluster import Devices

GIB = 1 << 30


@dataclass(frozen=True)
class Request:
    """Workers that hold CPUs, GPUs and memory while their part of a stage runs.

    key: the section of the config that sets them. decided_by: the key that decides how many there are.
    fewest, most: the stage begins with the fewest, and uses up to the most. cpus, gpus, memory_gib: those of each
    worker. counts_devices: there is one worker for each device of the cluster. fewest_cpus: if not None, the run
    decides later whether a worker holds this many CPUs or `cpus`.
    """

    key: str
    decided_by: str
    noun: str
    fewest: int
    most: int
    cpus: int
    gpus: int
    memory_gib: float | None = None
    counts_devices: bool = False
    fewest_cpus: int | None = None

    @property
    def device(self) -> str:
        """Return where the workers compute: cuda or cpu."""
        return "cuda" if self.gpus else "cpu"

    def describe(self) -> str:
        """Return a phrase such as "2 to 4 encoders of 1 CPU, 1 GPU, 8 GiB"."""
        number = count(self.most, self.noun)
        if self.fewest != self.most:
            number = f"{self.fewest:,} to {number}"
        each = [count(self.cpus, "CPU")]
        if self.fewest_cpus is not None and self.fewest_cpus != self.cpus:
            each = [f"{self.fewest_cpus:,} to {each[0]}"]
        each += [count(self.gpus, "GPU")] if self.gpus else []
        each += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        return f"{number} of {', '.join(each)}"


def request_workers(
    devices: "Devices",
    key: str,
    noun: str,
    *,
    device: str,
    num_workers: int | str | None,
    usual: int,
    cpus: int | None = 1,
    memory_gib: float | None = None,
) -> Request:
    """Return the workers that the config section `key` requests, for the plan and for the run.

    noun: the singular name of a worker. usual: the number of workers on CPUs if `num_workers` is None; on GPUs it is
    the number of GPUs. cpus: the CPUs of each worker; None divides those of the cluster equally, up to a node for each.

    Raises ConfigError for a GPU where there can be none.
    """
    gpus = int(devices.resolve(device, f"{key.partition('.')[0]}.device") == "cuda")
    limits = worker_range(num_workers, f"{key}.num_workers")
    # At least one worker: a cluster that can grow may have lost its last node since `check_request`, and a worker that
    # waits brings a new one.
    fewest, most = limits or (max(1, devices.num_gpus if gpus else usual),) * 2
    if cpus is None:
        # No node could ever give more than all of its CPUs.
        cpus = max(1, min(devices.num_cpus // most, devices.node_cpus))
    decided_by = f"{key}.num_workers"
    return Request(key, decided_by, noun, fewest, most, cpus, gpus, memory_gib, counts_devices=limits is None)


def request_gpu_tasks(devices: "Devices", key: str, noun: str) -> Request:
    """Return tasks of 1 CPU and 1 GPU: as many as there are GPUs, though one GPU can run them all in turn."""
    return Request(key, f"{key}.device", noun, fewest=1, most=max(1, devices.num_gpus), cpus=1, gpus=1)


def check_request(request: Request, devices: "Devices") -> None:
    """Raise ConfigError for a request that the cluster cannot meet now, unless the cluster may grow.

    A number of workers that only the user can know, on a cluster without any device yet, is refused, too.
    """
    if request.counts_devices and not (devices.num_gpus if request.gpus else devices.num_cpus):
        raise ConfigError(
            f"{request.decided_by}=null means as many as there are now, and there is no "
            f"{'GPU' if request.gpus else 'CPU'} {devices.where}: give {request.decided_by}=..., and "
            f"{request.key.partition('.')[0]}.device=cuda if GPUs will join"
        )
    shortage = describe_shortage(request, devices)
    if shortage and not devices.may_grow:
        raise ConfigError(f"{shortage}: lower it, or use a larger cluster (ray_address)")


def describe_shortage(request: Request, devices: "Devices") -> str:
    """Return what a request needs and the cluster does not have now; empty if it has everything."""
    # Without any node yet, the size of the largest one says nothing; the totals below do.
    if 0 < devices.node_cpus < request.cpus:
        return (
            f"{request.key}.cpus_per_worker={request.cpus} is more than the {count(devices.node_cpus, 'CPU')} of the "
            f"largest node {devices.where}"
        )
    memory = devices.node_memory_bytes
    if memory is not None and (request.memory_gib or 0) * GIB > memory:
        return (
            f"{request.key}.memory_gib={request.memory_gib:g} is more than the {memory / GIB:.1f} GiB that Ray gives "
            f"to workers on the largest node {devices.where}"
        )
    needed = {"CPU": request.fewest * request.cpus, "GPU": request.fewest * request.gpus}
    for noun, number in (("CPU", devices.num_cpus), ("GPU", devices.num_gpus)):
        if needed[noun] > number:
            return (
                f"{request.decided_by} requests {request.describe()}: {count(needed[noun], noun)} in all, and "
                f"there are {number:,} {devices.where}"
            )
    return ""
