"""Connect to a Ray cluster, and see its devices or, without one, those of this machine.

The pipeline decides whether it connects (pipeline/connection.py).
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import find_bootstrap_address

from elfs_ray.config import ConfigError
from elfs_ray.runtime.placement import describe_placement, is_chosen
from elfs_ray.runtime.progress import count

# By default BLAS and OpenMP start a thread for each CPU of the machine in every worker. With a worker on each CPU that
# is the square of the CPUs in threads, which are slower together than one thread a worker. The libraries read these
# variables when they are imported, so they must be in the environment in which Ray starts the workers.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Each step of a network on a CPU allocates its activations anew. In huge pages that costs a fortieth of the page
# faults and takes a seventh less time. C libraries other than glibc ignore the variable.
_HUGE_PAGES = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
# Whoever has sent a task to a node whose link is cut waits until gRPC finds the connection dead: by Ray's defaults for
# seven minutes, also if Ray has long given the node up. With these, for 100 s at most. A server that was started with
# the defaults drops clients that ask more than once a minute.
_KEEPALIVE = {
    name: os.environ.get(name, value)
    for name, value in {
        "RAY_grpc_client_keepalive_time_ms": "70000",
        "RAY_grpc_client_keepalive_timeout_ms": "30000",
    }.items()
}
WORKER_ENVIRONMENT = _ONE_THREAD | _HUGE_PAGES | _KEEPALIVE
CONNECT_TIMEOUT_S = 10
# Ray by itself retries a task that was killed for lack of memory for ever. Pauses double: 7 retries take two minutes.
OUT_OF_MEMORY_RETRIES = 7


def connect(address: str | None, *, show_worker_logs: bool = False, **init_options: Any) -> None:
    """Connect to a Ray cluster, or start one on this machine; do nothing if this process is connected already.

    address: as ray_address in the config. init_options: further options of ray.init.

    Raises ConfigError if no cluster answers at the address, or if none can be started.
    """
    if ray.is_initialized():
        return
    key, value = ("ray_address", address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", ""))
    _refuse_if_nothing_listens(key, value)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(_KEEPALIVE)
    os.environ.setdefault("RAY_task_oom_retries", str(OUT_OF_MEMORY_RETRIES))
    # Ray's warnings and notes go to its log files alone: in the terminal they would bury the progress.
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    environment: AbstractContextManager[None] = contextlib.nullcontext()
    if _starts_cluster(address, init_options.get("_temp_dir")):
        # Workers inherit the environment of the Ray that starts them. With a runtime_env none would start before the
        # first task needs it. The dashboard would take seconds of the CPUs that the first stages wait for.
        environment = _environment(WORKER_ENVIRONMENT)
        address = "local"
        init_options.setdefault("include_dashboard", False)
    else:
        init_options["runtime_env"] = {"env_vars": WORKER_ENVIRONMENT}
    try:
        with environment:
            ray.init(address=address, log_to_driver=show_worker_logs, logging_level=logging.ERROR, **init_options)
    except ConnectionError as error:
        raise ConfigError(_no_answer(key, value, error)) from error
    # Ray raises errors of many kinds, and few of them say what to do.
    except Exception as error:
        raise ConfigError(
            f"Ray cannot be started or joined: {type(error).__name__}: {error}. It needs a HOME that can be written, "
            "for its token, and a folder for its files that can be written and has a path of at most 40 characters: "
            "set HOME, or RAY_TMPDIR=/tmp"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # ray.init replaces the C-level handler of SIGTERM by one that aborts the process. Setting Python's handler
        # again restores it. `ray job stop` and batch schedulers send SIGTERM, and the job must then say what it has
        # kept.
        signal.signal(signal.SIGTERM, on_sigterm if callable(on_sigterm) else signal.getsignal(signal.SIGTERM))


def has_no_cluster(address: str | None) -> bool:
    """Return whether no cluster is connected, named by `address` or RAY_ADDRESS, or running on this machine.

    The address local means that none is to be used.
    """
    return not ray.is_initialized() and _starts_cluster(address, None)


def _starts_cluster(address: str | None, temp_dir: str | None) -> bool:
    """Return whether ray.init will start a Ray on this machine, rather than join one."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        return address == "local"
    # Without an address ray.init joins what `ray start` has started here. Ray has no public way to ask for that. What
    # it notes outlives a cluster that was killed, and ray.init would try for minutes to join that.
    started = find_bootstrap_address(temp_dir)
    return started is None or not _listens(started)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment within the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _refuse_if_nothing_listens(key: str, address: str) -> None:
    """Raise ConfigError for an address host:port to which nobody can connect; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):  # such as auto and local
        return
    try:
        _reach(host, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(_no_answer(key, address, error)) from error


def _reach(host: str, port: str) -> None:
    """Raise OSError or OverflowError if nothing listens at a host's port."""
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _listens(address: str) -> bool:
    """Return whether anything listens at an address host:port."""
    host, _, port = address.rpartition(":")
    try:
        _reach(host, port)
    except OSError:
        return False
    return True


def _no_answer(key: str, address: str, error: Exception) -> str:
    return (
        f"no Ray cluster answers at {key}={address}: {error}. Correct the address, start the cluster, or give "
        "ray_address=local for a Ray on this machine"
    )


@dataclass(frozen=True)
class Devices:
    """The CPUs, GPUs and memory on which stages can run now.

    where: a phrase for messages, such as "on this machine". node_cpus, node_memory_bytes: those of the largest node.
    may_grow: whether nodes may join while a stage waits. num_nodes: how many nodes there are.
    """

    num_cpus: int
    num_gpus: int
    where: str
    node_cpus: int
    node_memory_bytes: int | None = None
    may_grow: bool = False
    num_nodes: int = 1

    def resolve(self, device: str, key: str) -> str:
        """Return cpu or cuda for auto, cpu or cuda. Raises ConfigError for cuda where there can be no GPU.

        key: the key of the config that holds `device`, for the message.
        """
        if device == "cuda" and not self.num_gpus and not self.may_grow:
            raise ConfigError(f"{key}=cuda, but there is no GPU {self.where}: add one, or set {key}=cpu")
        if device == "auto":
            return "cuda" if self.num_gpus else "cpu"
        return device

    def describe(self) -> str:
        """Return a line such as "8 CPUs and 1 GPU in the Ray cluster now"."""
        return f"{count(self.num_cpus, 'CPU')} and {count(self.num_gpus, 'GPU')} {self.where}"


def find_devices(address: str | None) -> Devices:
    """Return the devices of the Ray cluster at `address` or RAY_ADDRESS, on the nodes that placement.py chooses.

    Without either, or for "local", return those of this machine. Start no cluster, so that a dry run is quick. Raises
    ConfigError if no cluster answers.
    """
    if not ray.is_initialized() and (address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        connect(address)
    return devices_of_cluster()


def devices_of_cluster() -> Devices:
    """Return the devices of the cluster that this process is connected to, on the nodes that placement.py chooses.

    Without a connection, return those of this machine.
    """
    if not ray.is_initialized():
        return _devices_of_this_machine()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and is_chosen(node["Labels"])]
    # A cluster that this process started is this machine and never grows; one that it joined may have an autoscaler.
    # Ray has no public way to tell the two apart.
    driver: Any = ray._private.worker._global_node
    return Devices(
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        num_gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        where=f"in the Ray cluster now{describe_placement()}",
        node_cpus=int(max((node.get("CPU", 0) for node in nodes), default=0)),
        node_memory_bytes=int(max((node.get("memory", 0) for node in nodes), default=0)),
        may_grow=not driver.is_head(),
        num_nodes=len(nodes),
    )


def _devices_of_this_machine() -> Devices:
    import torch

    if not is_chosen({}):  # a Ray that starts on this machine has no labels of the user's
        return Devices(0, 0, f"on this machine{describe_placement()}", 0, num_nodes=0)
    # A batch job may use fewer CPUs than the machine has, and a container's limit, which Ray reads, may be lower still.
    limit = int(ray._private.utils.get_num_cpus(override_docker_cpu_warning=True))
    num_cpus = max(1, min(len(os.sched_getaffinity(0)), limit))
    return Devices(num_cpus, torch.cuda.device_count(), "on this machine", num_cpus)


def num_cpus() -> int:
    """Return the number of CPUs in the cluster now, but at least 1.

    A cluster that grows may begin with no worker node; one waiting task is what makes its autoscaler add the first.
    """
    return max(1, devices_of_cluster().num_cpus)


def num_gpus() -> int:
    """Return the number of GPUs in the cluster now, but at least 1 if the cluster may grow."""
    devices = devices_of_cluster()
    return devices.num_gpus or int(devices.may_grow)


def resolve_device(device: str, key: str) -> str:
    """Return `Devices.resolve` for the cluster as it is now."""
    return devices_of_cluster().resolve(device, key)
