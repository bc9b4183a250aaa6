"""What each stage asks of the cluster: how many workers, and the CPUs, GPUs and memory of each."""

from dataclasses import dataclass

from elfs_ray.config import Config, ConfigError, check_pretraining_workers, proxy_workers, worker_range
from elfs_ray.runtime.cluster import Devices
from elfs_ray.runtime.progress import count

GIB = 1 << 30


@dataclass(frozen=True)
class Request:
    """Workers that hold their CPUs, GPUs and memory while their part of a stage runs, and let go of them then.

    `key` is the section of the config that asks. A stage can begin with `fewest` workers.
    """

    key: str
    noun: str
    fewest: int
    most: int
    cpus: int
    gpus: int
    memory_gib: float | None

    def describe(self) -> str:
        """2 to 4 encoders of 1 CPU, 1 GPU, 8 GiB."""
        number = count(self.most, self.noun)
        if self.fewest != self.most:
            number = f"{self.fewest:,} to {number}"
        each = [count(self.cpus, "CPU")]
        each += [count(self.gpus, "GPU")] if self.gpus else []
        each += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        return f"{number} of {', '.join(each)}"


def requests_of(stage: str, config: Config, devices: Devices) -> list[Request]:
    """What a stage asks for beside tasks of one CPU, which run where CPUs are free.

    Raises ConfigError for a GPU where there can be none, and for a number of workers that only the user can give.
    """
    embed, cluster, train, temi = config.embed, config.cluster, config.train, config.cluster.temi
    cpus = devices.num_cpus
    if stage == "embed":
        each = (embed.cpus_per_worker or 1, embed.memory_gib)
        return [_request(devices, "embed", "encoder", embed.device, embed.num_workers, cpus, *each)]
    if stage == "pretrain":
        own = config.pretrain
        each = (own.cpus_per_worker or 1, own.memory_gib)
        check_pretraining_workers(devices.resolve(own.device, "pretrain.device"), own.num_workers or 1)
        return [_request(devices, "pretrain", "worker", own.device, own.num_workers, 1, *each)]
    if stage == "train":
        each = (train.cpus_per_worker or 1, train.memory_gib)
        return [_request(devices, "train", "worker", train.device, proxy_workers(train), 1, *each)]
    if stage != "cluster" or cluster.method == "file":
        return []
    shards = _request(devices, "cluster", "shard", cluster.device, cluster.num_workers, cpus, 1, cluster.memory_gib)
    if cluster.method != "temi":
        return [shards]
    return [shards, _request(devices, "cluster.temi", "TEMI worker", cluster.device, temi.num_workers, 1, 1, None)]


def advice_on(stage: str, config: Config, devices: Devices) -> list[str]:
    """What a person should know of a stage before it runs for days."""
    pretrain = config.pretrain
    if stage != "pretrain" or pretrain.profile != "gpu" or pretrain.epochs is not None:
        return []
    if devices.resolve(pretrain.device, "pretrain.device") == "cuda":
        return []
    return ["will take days on CPUs with pretrain.profile=gpu: pretrain.profile=cpu takes half an hour on 2 cores"]


def _request(
    devices: Devices,
    key: str,
    noun: str,
    device: str,
    num_workers: int | str | None,
    usual: int,
    cpus: int,
    memory_gib: float | None,
) -> Request:
    """`usual` is the number of workers on CPUs where the config names none."""
    gpus = int(devices.resolve(device, f"{key.partition('.')[0]}.device") == "cuda")
    workers = worker_range(num_workers, f"{key}.num_workers")
    if workers is None:
        if not (devices.num_gpus if gpus else devices.num_cpus):
            raise ConfigError(
                f"{key}.num_workers=null takes what is there, and there is no {'GPU' if gpus else 'CPU'} "
                f"{devices.where}: give {key}.num_workers=..., and {key.partition('.')[0]}.device=cuda where GPUs are "
                "to come"
            )
        workers = (devices.num_gpus if gpus else usual,) * 2
    fewest, most = workers
    return Request(key, noun, fewest, most, cpus, gpus, memory_gib)


def check_same_workers(request: Request, workers: list[int]) -> None:
    """Raise ConfigError where lost records of training would be made again by other numbers of workers than before."""
    if len(workers) > 1:
        raise ConfigError(
            f"the lost tables of stage {request.key} were made by a number of workers that changed "
            f"({', '.join(map(str, workers))}), and cannot be made again: restore them, or give another run_dir"
        )
    if not request.fewest <= workers[0] <= request.most:
        raise ConfigError(
            f"the lost tables of stage {request.key} were made by {count(workers[0], 'worker')}, and "
            f"{request.describe()} would make others: give {request.key}.num_workers={workers[0]}"
        )


def check_request(request: Request, devices: Devices) -> None:
    """Raise ConfigError for more than the cluster has, unless it may grow."""
    shortage = describe_shortage(request, devices)
    if shortage and not devices.may_grow:
        raise ConfigError(f"{shortage}: lower it, or use a larger cluster (ray_address)")


def describe_shortage(request: Request, devices: Devices) -> str:
    """Say what a request needs that the cluster does not have now; empty where it has all."""
    # Where there is no node yet, its size says nothing: the totals below do.
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
                f"{request.key}.num_workers asks for {request.describe()}: {count(needed[noun], noun)} in all, and "
                f"there are {number:,} {devices.where}"
            )
    return ""
