"""Keys of section cluster: how embeddings become pseudo-labels."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from elfs_ray.config.declaration import POSITIVE, Bounds, device_option, label_option, memory_option, option
from elfs_ray.config.temi import TEMI_NEIGHBORS, TemiConfig

NEIGHBOR_KEYS = ("num_neighbors", "neighbor_search", "neighbor_recall")
"""The keys of this section that are those of stage neighbors, besides `method`."""


@dataclass
class ClusterConfig:
    """Clustering of the embeddings into pseudo-classes."""

    method: str = option(
        "kmeans",
        "kmeans; temi: deep clustering on top of k-means; file: pseudo-labels made elsewhere, see labels_uri",
        choices=("kmeans", "temi", "file"),
    )
    num_clusters: int | str = option(
        MISSING,
        "number of clusters, best the expected number of classes; auto estimates it",
        unit="clusters",
        choices=("auto",),
        bounds=Bounds(at_least=2),
    )
    labels_uri: str | None = option(
        None,
        "for method=file: Parquet with pseudo_label (integers from 0) and sample_id or uri, for every embedded image",
        is_path=True,
    )
    max_iterations: int = option(100, "maximum number of Lloyd iterations of each try", bounds=POSITIVE)
    tolerance: float = option(
        1e-4,
        "stop when an iteration improves the objective by less than this fraction",
        bounds=Bounds(at_least=0, below=1),
    )
    num_tries: int = option(3, "number of seedings; the result with the lowest objective is kept", bounds=POSITIVE)
    spherical: bool = option(False, "normalise centroids to unit length")
    engine: str = option(
        "auto",
        "library that searches for the nearest centroids, with the same result; auto uses the faster one, torch",
        choices=("auto", "torch", "faiss"),
        decides=False,
    )
    num_neighbors: int | None = option(
        None,
        f"nearest neighbours of each image to keep in neighbors/; null means {TEMI_NEIGHBORS} for temi, else 0 (none)",
        bounds=Bounds(at_least=0),
    )
    neighbor_search: str = option(
        "auto",
        "exact; ivf: approximate, by faiss on CPUs; auto: exact on GPUs, and on CPUs up to 200,000 images",
        choices=("auto", "exact", "ivf"),
    )
    neighbor_recall: float = option(
        0.95,
        "fraction of the exact neighbours that ivf must find, measured on a sample; of near-duplicates at a similarity "
        "of 0.9 where neighbours serve for nothing else",
        bounds=Bounds(above=0, at_most=1),
    )
    device: str = device_option("assignment, neighbour search and TEMI run")
    num_workers: int | None = option(
        None,
        "number of shards in memory at once; null means one for each GPU, or one for each CPU",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = memory_option("shard")
    label_selector: str | None = label_option("shards, neighbour search and TEMI", "label_selector of the whole run")
    temi: TemiConfig = field(default_factory=TemiConfig)

    @property
    def kept_neighbors(self) -> int:
        """Return how many nearest neighbours of each sample the run keeps, in a pool that has as many."""
        if self.num_neighbors is not None:
            return self.num_neighbors
        return TEMI_NEIGHBORS if self.method == "temi" else 0
