"""cluster.*: pseudo-labels."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from elfs_ray.config.declaration import POSITIVE, Bounds, device_option, memory_option, option
from elfs_ray.config.temi import TEMI_NEIGHBORS, TemiConfig


@dataclass
class ClusterConfig:
    """Pseudo-labels."""

    method: str = option(
        "kmeans",
        "kmeans; temi: deep clustering after it; file: pseudo-labels made elsewhere",
        choices=("kmeans", "temi", "file"),
    )
    num_clusters: int | str = option(
        MISSING,
        "the expected number of classes, or auto for an estimate",
        unit="clusters",
        choices=("auto",),
        bounds=Bounds(at_least=2),
    )
    labels_uri: str | None = option(
        None,
        "method=file: Parquet with pseudo_label (integers from 0) and sample_id or uri, for every embedded image",
        is_path=True,
    )
    max_iterations: int = option(100, "Lloyd iterations of each try, at most", bounds=POSITIVE)
    tolerance: float = option(
        1e-4, "stop when the objective improves by a smaller share than this", bounds=Bounds(at_least=0, below=1)
    )
    num_tries: int = option(3, "seedings; the one with the lowest objective is kept", bounds=POSITIVE)
    spherical: bool = option(False, "normalise centroids to unit length")
    engine: str = option(
        "auto",
        "what searches for the nearest centroids: torch or faiss, with the same result; auto takes the faster, torch",
        choices=("auto", "torch", "faiss"),
        decides=False,
    )
    num_neighbors: int | None = option(
        None,
        f"nearest neighbours kept in neighbors/; null takes {TEMI_NEIGHBORS} for temi and 0, none, for others",
        bounds=Bounds(at_least=0),
    )
    neighbor_search: str = option(
        "auto",
        "exact; ivf: faiss's inverted file, approximate, on CPUs; auto: exact up to 200,000 images on CPUs and on GPUs",
        choices=("auto", "exact", "ivf"),
    )
    neighbor_recall: float = option(
        0.95,
        "share of the exact neighbours that ivf must find, measured on a sample",
        bounds=Bounds(above=0, at_most=1),
    )
    device: str = device_option("assignment, neighbours and TEMI run")
    num_workers: int | None = option(
        None, "shards in memory at once; null takes one a GPU, or one a CPU", bounds=POSITIVE, decides=False
    )
    memory_gib: float | None = memory_option("shard")
    temi: TemiConfig = field(default_factory=TemiConfig)

    @property
    def kept_neighbors(self) -> int:
        """Return how many nearest neighbours of each sample the run keeps, in a pool that has as many."""
        if self.num_neighbors is not None:
            return self.num_neighbors
        return TEMI_NEIGHBORS if self.method == "temi" else 0
