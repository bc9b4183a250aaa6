"""cluster: give every embedding a pseudo-label."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from elfs_ray.config import (
    NEIGHBOR_KEYS,
    ClusterConfig,
    Config,
    ConfigError,
    check_balance,
    check_temi_workers,
    deciding_keys,
)
from elfs_ray.methods.numeric.faiss_build import check_faiss
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import Request, request_workers
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.stages.training import needs_ray
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class ClusterResult(Result):
    """The number of samples with a pseudo-label, the sizes of the clusters, and metrics that need no true labels.

    objective and iterations are those of k-means. temi and num_clusters_evidence are None or empty without TEMI and
    without an estimate of the number of clusters. trust: the fields of a LabelTrust (methods/clustering_trust.py) and
    `right`, the estimated share of right pseudo-labels; None if the clusters are too small to tell.
    """

    stage: ClassVar[str] = "cluster"
    rows: int
    num_clusters: int
    method: str
    workers: int
    sizes: list[int]
    num_clusters_evidence: list[Mapping[str, float]] = field(default_factory=list)
    objective: float | None = None
    iterations: int | None = None
    trust: Mapping[str, float] | None = None
    temi: Mapping[str, Any] | None = None


def _describe(config: Config, num_samples: int) -> str:
    cluster = config.cluster
    if cluster.method == "file":
        return f"pseudo-labels from {cluster.labels_uri}"
    tries = count(cluster.num_tries, "try", "tries")
    if cluster.num_clusters == "auto":
        from elfs_ray.methods.kmeans.num_clusters import MAX_CLUSTERS, MIN_ROWS_PER_CLUSTER

        most = max(2, min(MAX_CLUSTERS, num_samples // MIN_ROWS_PER_CLUSTER))
        number = f"2 to {count(most, 'cluster')}, as the embeddings suggest"
    else:
        each = num_samples / int(cluster.num_clusters)
        number = f"{count(int(cluster.num_clusters), 'cluster')} of {each:,.{int(each < 10)}f} images on average"
    clustering = f"{number}, {tries} of up to {count(cluster.max_iterations, 'iteration')}"
    return clustering + (f", then TEMI, {cluster.temi.profile} profile" if cluster.method == "temi" else "")


def _requests(config: Config, devices: "Devices") -> list[Request]:
    cluster = config.cluster
    _check_faiss(config, devices.resolve(cluster.device, "cluster.device"))
    requests = [request_shards(cluster, devices)]
    if cluster.method == "temi":
        from elfs_ray.methods.temi.heads import CPU_PROFILE, TemiSettings

        requests.append(request_temi_workers(cluster, devices))
        profile = CPU_PROFILE["batch_size"] if cluster.temi.profile == "cpu" else TemiSettings.batch_size
        check_temi_workers(cluster.temi.batch_size or profile, requests[-1].most)
    return requests


def request_shards(cluster: ClusterConfig, devices: "Devices") -> Request:
    """Return the workers that hold the embeddings."""
    return request_workers(
        devices,
        "cluster",
        "shard",
        device=cluster.device,
        num_workers=cluster.num_workers,
        usual=devices.num_cpus,
        memory_gib=cluster.memory_gib,
    )


def request_temi_workers(cluster: ClusterConfig, devices: "Devices") -> Request:
    """Return the workers that train TEMI's heads, each with 1 GPU and 1 CPU or with an equal share of the CPUs."""
    request = request_workers(
        devices,
        "cluster.temi",
        "TEMI worker",
        device=cluster.device,
        num_workers=cluster.temi.num_workers,
        usual=1,
        cpus=None,
    )
    return dataclasses.replace(request, cpus=1) if request.gpus else request


def _check_faiss(config: Config, device: str) -> None:
    """Raise ConfigError if the stage needs faiss on a device and the installed faiss, if any, cannot serve it."""
    cluster = config.cluster
    try:
        if cluster.engine == "faiss" and cluster.method != "file":
            check_faiss("cluster.engine=faiss", device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check(config: Config) -> None:
    if config.cluster.method == "file" and not filesystem.exists(str(config.cluster.labels_uri)):
        raise ConfigError(f"cluster.labels_uri={config.cluster.labels_uri!r} does not exist")


def _check_listed(config: Config, run_dir: RunDir) -> None:
    if config.cluster.method == "file":
        from elfs_ray.stages.cluster.external_labels import read_external_labels

        read_external_labels(config.cluster, run_dir)


def _check_result(config: Config, run_dir: RunDir) -> None:
    check_balance(config, ClusterResult.read(run_dir).num_clusters)


STAGE = Stage(
    result=ClusterResult,
    section="cluster",
    section_keys=tuple(key for key in deciding_keys(ClusterConfig()) if key not in NEIGHBOR_KEYS),
    is_part_of=lambda config: config.needs_clusters,
    is_estimated=True,
    needs_ray=lambda config: config.cluster.method == "temi" and needs_ray(config.cluster.temi.num_workers, None),
    inputs=lambda config: ("embed", "neighbors") if config.cluster.kept_neighbors else ("embed",),
    tables=lambda config: (schema.CLUSTERS,),
    describe=_describe,
    requests=_requests,
    check=_check,
    check_listed=_check_listed,
    check_result=_check_result,
)
