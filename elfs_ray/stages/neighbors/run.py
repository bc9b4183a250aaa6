"""neighbors: find the nearest neighbours of every sample, for TEMI, near-duplicates and
selections that use the graph of them.

Reads   embeddings/
Writes  neighbors/ (sample_id, neighbor_ids, similarity), one file for each file of embeddings/

search.py does the work.
"""

from elfs_ray.config import Config
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.neighbors import NeighborsResult
from elfs_ray.stages.neighbors.search import find_neighbors
from elfs_ray.storage.run_dir import RunDir


def run_neighbors(config: Config, run_dir: RunDir) -> NeighborsResult:
    """Write neighbors/. Raises ValueError for as many neighbours as samples."""
    num_samples = EmbedResult.read(run_dir).rows
    kept = config.kept_neighbors
    # The default adapts to a small pool. The user's number does not: it is refused where it is too large.
    if not config.cluster.num_neighbors:
        kept = min(kept, num_samples - 1)
    copies_alone = not config.cluster.kept_neighbors  # then only the near-duplicates need the neighbours
    search = find_neighbors(config.cluster, run_dir, kept, config.seed, copies_alone=copies_alone)
    return NeighborsResult(num_samples, **search)
