"""Find the nearest centroid of every embedding, exactly, on a CPU or a GPU, independently of the size of a batch.

A matrix product rounds differently with the shape of its batch. So a fast search is only a filter here (filters.py):
where it leaves several candidates, their distances are compared exactly (numeric/exact_arithmetic.py).
"""

import warnings

import numpy as np
import torch

from elfs_ray.methods.kmeans.filters import FaissFilter, ProductFilter
from elfs_ray.methods.numeric.exact_arithmetic import (
    MAX_NORM,
    exact_centroids,
    exact_rows,
    flat_nonzero,
    row_chunks,
    select_rows,
    squared_norms,
)
from elfs_ray.methods.numeric.workspace import Workspace

ENGINES = ("torch", "faiss")
FASTEST_ENGINE = "torch"  # as measured by benchmarks/kmeans.py, on CPUs and on GPUs

_NUM_IDS_IN_ERROR = 10


def check_device(device: str | torch.device) -> torch.device:
    """Return the torch device of a name. Raises ValueError for a GPU that torch does not see."""
    resolved = torch.device(device)
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device='cpu', or a "
            "machine with that GPU and a CUDA build of torch"
        )
    return resolved


def embeddings_to_device(embeddings: np.ndarray, sample_ids: np.ndarray, device: torch.device) -> torch.Tensor:
    """Put embeddings (n, d) float16 on a device; on a CPU the memory (or memory map) is shared, not copied.

    Raises ValueError as `embeddings_with_norms`.
    """
    return embeddings_with_norms(embeddings, sample_ids, device)[0]


def embeddings_with_norms(
    embeddings: np.ndarray, sample_ids: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (n, d) float16 on a device, as `embeddings_to_device`, and their exact squared norms.

    Raises ValueError for shapes or dtypes that do not fit, and for embeddings that hold NaN or infinity or are not of
    unit length (within 1%), with the sample ids.
    """
    if embeddings.ndim != 2 or embeddings.dtype != np.float16:
        raise ValueError(f"embeddings are {embeddings.dtype} {embeddings.shape}; they must be float16 of shape (n, d)")
    if sample_ids.shape != embeddings.shape[:1] or sample_ids.dtype != np.int64:
        raise ValueError(
            f"sample_ids are {sample_ids.dtype} {sample_ids.shape}; they must be int64 of shape {embeddings.shape[:1]}"
        )
    with warnings.catch_warnings():
        # torch warns of arrays that are not writable, as memory maps are. Nothing here writes to embeddings.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        on_device = torch.from_numpy(np.ascontiguousarray(embeddings)).to(device)
    squared = squared_norms(on_device)
    norms = np.sqrt(squared.cpu().numpy())
    if not np.isfinite(norms).all():
        _raise_for(sample_ids[~np.isfinite(norms)], "hold NaN or infinity", "remove them, or embed them again")
    off_unit = (norms > MAX_NORM) | (norms < 2 - MAX_NORM)
    if off_unit.any():
        _raise_for(sample_ids[off_unit], "are not of unit length", "divide every embedding by its norm first")
    return on_device, squared


def nearest_centroids(embeddings: torch.Tensor, centroids: np.ndarray, engine: str = FASTEST_ENGINE) -> torch.Tensor:
    """Return the nearest centroid of every embedding; ties go to the lower centroid id.

    embeddings (n, d) float16 of unit length on any device; centroids (k, d), rounded to multiples of 2^-24 if they are
    not yet. Returns (n,) int64 on the device of the embeddings, the same for every engine.
    Memory beside the embeddings: 20 k·d bytes, and up to 64 MB (CPU) or 1 GB (GPU) for a chunk of rows.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}")
    exact = exact_centroids(centroids, embeddings.device)
    search = FaissFilter(exact) if engine == "faiss" else ProductFilter(exact)
    labels = torch.empty(len(embeddings), dtype=torch.int64, device=embeddings.device)
    contested = [torch.empty(0, dtype=torch.int64, device=embeddings.device)]  # torch.cat refuses an empty list
    for rows in row_chunks(len(embeddings), len(exact), embeddings.device):
        labels[rows], close = search.search(embeddings[rows])
        contested.append(flat_nonzero(close) + rows.start)
    # Contested rows are few and spread over the chunks, and a comparison has a fixed cost: gather them all first.
    unsettled = torch.cat(contested)
    for rows in row_chunks(len(unsettled), len(exact), embeddings.device):
        labels[unsettled[rows]] = search.settle(select_rows(embeddings, unsettled[rows]))
    return labels


def squared_distances_to(embeddings: torch.Tensor, centroids: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    """Return the exact squared distances (n,) float64 of embeddings (n, d) to the centroids (k, d) of labels (n,).

    Take roots with numpy, which rounds them correctly; torch's on a CPU are sometimes an ulp off.
    """
    exact = exact_centroids(centroids, embeddings.device)
    result = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    space = Workspace(embeddings.device)
    # ‖x - c‖² directly: exact as well, and 0 for equal points without ‖x‖² - 2 x·c + ‖c‖²'s extra terms.
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        differences = space.copy("rows", embeddings[rows], torch.float64).sub_(exact[labels[rows]])
        torch.sum(differences.square_(), 1, out=result[rows])
    return result


def add_rows(sums: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
    """Add every embedding to the row of sums (k, d) float64 of its label, exactly."""
    space = Workspace(embeddings.device)
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        sums.index_add_(0, labels[rows], space.copy("rows", embeddings[rows], torch.float64))


def move_rows(sums: torch.Tensor, embeddings: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    """Take every embedding from the row of sums (k, d) float64 of one label and add it to that of another, exactly."""
    exact = exact_rows(embeddings)
    sums.index_add_(0, before, exact, alpha=-1)
    sums.index_add_(0, after, exact)


def _raise_for(sample_ids: np.ndarray, fault: str, remedy: str) -> None:
    shown = ", ".join(str(i) for i in np.sort(sample_ids)[:_NUM_IDS_IN_ERROR])
    more = f" and {len(sample_ids) - _NUM_IDS_IN_ERROR} more" if len(sample_ids) > _NUM_IDS_IN_ERROR else ""
    raise ValueError(f"{len(sample_ids)} embeddings {fault}: sample ids {shown}{more}; {remedy}")
