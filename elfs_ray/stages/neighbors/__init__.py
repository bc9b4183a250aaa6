"""neighbors: find the most similar samples of every sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from elfs_ray.config import NEIGHBOR_KEYS, ClusterConfig, Config, ConfigError
from elfs_ray.methods.numeric.faiss_build import check_faiss
from elfs_ray.runtime.resources import Request, request_gpu_tasks
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import schema

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices

MAX_EXACT_ON_CPU = 200_000


@dataclass(frozen=True)
class NeighborsResult(Result):
    """The number of samples and of neighbours of each, and the kind of search, exact or ivf.

    num_lists, nprobe and recall describe the inverted file of ivf, recall_measured the recall of every nprobe tried.
    """

    stage: ClassVar[str] = "neighbors"
    rows: int
    num_neighbors: int
    search: str
    num_lists: int | None = None
    nprobe: int | None = None
    recall: float | None = None
    recall_measured: Sequence[Mapping[str, float]] | None = None


def searches_on_gpus(cluster: ClusterConfig, devices: "Devices") -> bool:
    """Return True if tasks on GPUs search for the nearest neighbours; the inverted file is on CPUs only."""
    return devices.resolve(cluster.device, "cluster.device") == "cuda" and cluster.neighbor_search != "ivf"


def choose_search(cluster: ClusterConfig, devices: "Devices", num_samples: int) -> str:
    """Return exact or ivf, as the config says or as the size of the pool decides."""
    if cluster.neighbor_search != "auto":
        return cluster.neighbor_search
    return "exact" if num_samples <= MAX_EXACT_ON_CPU or searches_on_gpus(cluster, devices) else "ivf"


def _describe(config: Config, num_samples: int) -> str:
    return f"{config.kept_neighbors} nearest neighbours of each image, {config.cluster.neighbor_search} search"


def _requests(config: Config, devices: "Devices") -> list[Request]:
    cluster = config.cluster
    num = cluster.num_neighbors
    key = f"cluster.num_neighbors={num}" if num else f"cluster.method={cluster.method}"
    if not cluster.kept_neighbors:
        key = f"duplicates.threshold={config.duplicates.threshold}"
    on_gpus = searches_on_gpus(cluster, devices)
    try:
        check_faiss(key, "cuda" if on_gpus else "cpu")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [request_gpu_tasks(devices, "cluster", "neighbour search task")] if on_gpus else []


STAGE = Stage(
    result=NeighborsResult,
    section="cluster",
    # The method alone says how many are kept where the config gives no number.
    section_keys=("method", *NEIGHBOR_KEYS),
    is_part_of=lambda config: config.needs_neighbors,
    is_estimated=True,
    inputs=lambda config: ("embed",),
    tables=lambda config: (schema.NEIGHBORS,),
    describe=_describe,
    requests=_requests,
)
