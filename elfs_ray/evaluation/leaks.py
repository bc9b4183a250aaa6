"""Find test images that have a near-duplicate in the pool: a method that chose it may know them by heart.

Reads   embeddings/ and index/ of the run, and the embeddings of the test images
Writes  quality/leaks-<hash>.json in the folder of the evaluation
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from elfs_ray.evaluation.true_labels import digest
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.training.classifier_inputs import kept_or_computed
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

QUERIES_PER_TASK = 2_000
MAX_EXAMPLES = 10


@dataclass(frozen=True)
class Leaks:
    """How many of the test images are at least as similar as the threshold to an image of the pool.

    examples: (uri of a test image, of the image of the pool, similarity), the most similar first.
    """

    num_leaking: int
    num_tested: int
    threshold: float
    examples: list[tuple[str, str, float]]


def find_leaks(
    run_dir: RunDir, embeddings: np.ndarray, uris: Sequence[str], threshold: float, device: str, folder: str
) -> Leaks:
    """Return the leaks among test images (n, d) float16, from a file in `folder` if they were looked for before.

    Cost: 2 · n · d operations for each image of the pool.
    """
    name = f"leaks-{digest(run_dir.identity('embed'), embeddings, list(uris), threshold)}.json"

    def compute() -> dict[str, object]:
        return asdict(_find(run_dir, embeddings, uris, threshold, device))

    return Leaks(**kept_or_computed(filesystem.join(folder, name), compute))


def _find(run_dir: RunDir, embeddings: np.ndarray, uris: Sequence[str], threshold: float, device: str) -> Leaks:
    starts = range(0, len(embeddings), QUERIES_PER_TASK)
    tasks = [(run_dir, embeddings[start : start + QUERIES_PER_TASK], device) for start in starts]
    nearest = np.empty(len(embeddings), np.int64)
    similarity = np.empty(len(embeddings), np.float32)
    with Progress("evaluate", len(embeddings), "test images compared with the pool") as progress:
        for position, (ids, cosines) in run_tasks(_nearest, tasks, num_gpus_each=1 if device == "cuda" else 0):
            rows = slice(starts[position], starts[position] + len(ids))
            nearest[rows], similarity[rows] = ids, cosines
            progress.advance(len(ids))
    leaking = np.flatnonzero(similarity >= np.float32(threshold))
    shown = leaking[np.argsort(-similarity[leaking], kind="stable")][:MAX_EXAMPLES]
    pool_uris = run_dir.read_rows(schema.INDEX, nearest[shown], [schema.URI])[schema.URI].to_pylist()
    examples = [
        (uris[row], uri, round(float(similarity[row]), 4)) for row, uri in zip(shown.tolist(), pool_uris, strict=True)
    ]
    return Leaks(len(leaking), len(embeddings), threshold, examples)


def _nearest(run_dir: RunDir, queries: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the id of the most similar image of the pool for each query (q, d), and the similarity (q,) float32."""
    torch.set_num_threads(1)
    # No image of the pool has these ids, so none is left out as the query itself.
    neighbors = nearest_neighbors(queries, np.full(len(queries), -1), _shards(run_dir), 1, device=device)
    return neighbors.neighbor_ids[:, 0], neighbors.similarity[:, 0]


def _shards(run_dir: RunDir) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in run_dir.read_table(schema.EMBEDDINGS):
        yield schema.matrix_of(rows, schema.EMBEDDING), rows[schema.SAMPLE_ID].to_numpy()
