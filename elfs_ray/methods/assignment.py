"""The nearest centroid of every embedding, exactly, on a CPU or a GPU, whatever the size of the batch.

Everything here is fixed-point arithmetic in disguise. A float16 is a multiple of 2^-24, and centroids are rounded to
multiples of 2^-24, which for coordinates up to 1 are float32 values. Products of the two are multiples of 2^-48 and,
for vectors of unit length, sums of them stay below 2^5: they fit the 53 bits of a float64. So float64 dot products and
squared distances are exact, and independent of the order of summation, of the device and of the library.

A fast product in float32 (CPU) or on float16 tensor cores (GPU) is therefore only a filter with a proven error: where
it leaves one candidate that is the nearest centroid, where it leaves several they are compared exactly. Ties go to the
lower centroid id.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import faiss
import numpy as np
import torch

FIXED_POINT_UNIT = 2.0**-24
MAX_NORM = 1.01
ENGINES = ("torch", "faiss")

_SETTLE_PAIRS = 1024
_NUM_IDS_IN_ERROR = 10


def default_engine(device: str | torch.device) -> str:
    """The engine that was measured as the fastest on this kind of device: "torch" (benchmarks/kmeans.py)."""
    return {"cpu": "torch", "cuda": "torch"}[torch.device(device).type]


def check_device(device: str | torch.device) -> torch.device:
    """Return the device, or raise ValueError where a GPU was asked for that torch cannot see."""
    resolved = torch.device(device)
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "ask for device='cpu', or install a CUDA build of torch on a machine with that GPU"
        )
    return resolved


def embeddings_to_device(embeddings: np.ndarray, sample_ids: np.ndarray, device: torch.device) -> torch.Tensor:
    """Put embeddings (n, d) float16 on a device; on the CPU the memory (or memory map) is shared, not copied.

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
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        on_device = torch.from_numpy(np.ascontiguousarray(embeddings)).to(device)
    norms = np.sqrt(squared_norms(on_device).cpu().numpy())
    if not np.isfinite(norms).all():
        _refuse(sample_ids[~np.isfinite(norms)], "hold NaN or infinity", "remove them, or embed them again")
    off_unit = (norms > MAX_NORM) | (norms < 2 - MAX_NORM)
    if off_unit.any():
        _refuse(sample_ids[off_unit], "are not of unit length", "divide every embedding by its norm first")
    return on_device


def to_fixed_point(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 2^-24, as float32: exact for |value| <= 1, the coordinates of centroids."""
    return (np.rint(np.asarray(values, dtype=np.float64) / FIXED_POINT_UNIT) * FIXED_POINT_UNIT).astype(np.float32)


def squared_norms(embeddings: torch.Tensor) -> torch.Tensor:
    """Exact squared norms (n,) float64 of embeddings (n, d) float16."""
    result = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        result[rows] = exact_rows(embeddings[rows]).square().sum(1)
    return result


def nearest_centroids(embeddings: torch.Tensor, centroids: np.ndarray, engine: str | None = None) -> torch.Tensor:
    """The nearest centroid of every embedding, ties to the lower centroid id.

    embeddings (n, d) float16 of unit length on any device; centroids (k, d), rounded to multiples of 2^-24 if they are
    not yet. Returns (n,) int64 on the device of the embeddings. The engine defaults to the device's fastest.
    Memory beside the embeddings: 20 k·d bytes and, a chunk of rows, up to 64 MB (CPU) or 1 GB (GPU).
    """
    engine = engine or default_engine(embeddings.device)
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}")
    if not np.isfinite(centroids).all():
        raise ValueError("centroids hold NaN or infinity; every coordinate must be a finite number")
    exact = torch.from_numpy(to_fixed_point(centroids)).to(embeddings.device).double()
    search = _FaissFilter(exact) if engine == "faiss" else _TorchFilter(exact)
    labels = torch.empty(len(embeddings), dtype=torch.int64, device=embeddings.device)
    for rows in row_chunks(len(embeddings), len(exact), embeddings.device):
        labels[rows] = search(embeddings[rows])
    return labels


def squared_distances_to(embeddings: torch.Tensor, centroids: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    """Exact squared distances (n,) float64 of embeddings (n, d) to those of centroids (k, d) that labels (n,) name.

    Take roots with numpy, which rounds them correctly; torch's on a CPU are now and then an ulp off.
    """
    exact = torch.from_numpy(to_fixed_point(centroids)).to(embeddings.device).double()
    result = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        result[rows] = (exact_rows(embeddings[rows]) - exact[labels[rows]]).square().sum(1)
    return result


def add_rows(sums: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, sign: int = 1) -> None:
    """Add (or with sign=-1 take away) every embedding to the row of sums (k, d) float64 that its label names; exact."""
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        sums.index_add_(0, labels[rows], exact_rows(embeddings[rows]), alpha=sign)


def exact_rows(rows: torch.Tensor) -> torch.Tensor:
    """float16 or float32 rows as float64; on a CPU the way over float32 is 2.5 times faster than torch's direct one."""
    return rows.float().double()


def row_chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that keep a (rows, width) block in a CPU's cache, or large enough to fill a GPU."""
    smallest, largest, elements = (1024, 2**18, 2**26) if device.type == "cuda" else (64, 1024, 2**22)
    size = min(largest, max(smallest, elements // width))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def fast_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (m, d) times the transpose of right (n, d) as float32 (m, n): on float16 tensor cores, or by a CPU's sgemm.

    Both are float16; on a CPU float32 will do. The error of an element is at most `product_error` times both norms.
    """
    if left.is_cuda:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    with _ieee_float32():
        return torch.mm(left.float(), right.float().T)


def product_error(dim: int, device: torch.device) -> float:
    """Bound of a fast product's error, relative to the two norms: dim + 4 roundings (Higham 2002, section 3.1).

    Products of the inputs are exact in float32 or counted as a rounding. A tensor core adds with truncation and a few
    guard bits, for which 2^-22 instead of 2^-24 stands.
    """
    roundings = (dim + 4) * (2.0**-22 if device.type == "cuda" else 2.0**-24)
    return roundings / (1 - roundings)


def flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Flat positions of a mask's true elements, ascending. numpy's is several times faster than torch's on a CPU."""
    if mask.is_cuda:
        return mask.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def exact_products(
    left: torch.Tensor, left_rows: torch.Tensor, right: torch.Tensor, right_rows: torch.Tensor
) -> torch.Tensor:
    """Exact float64 products (p,) of the pairs of rows left[left_rows] · right[right_rows]."""
    result = torch.empty(len(left_rows), dtype=torch.float64, device=left.device)
    size = _SETTLE_PAIRS * (64 if left.is_cuda else 1)
    for start in range(0, len(left_rows), size):
        pairs = slice(start, start + size)
        result[pairs] = (exact_rows(left[left_rows[pairs]]) * exact_rows(right[right_rows[pairs]])).sum(1)
    return result


class _TorchFilter:
    """Matrix product in chunks, then an exact comparison of the centroids that its rounding cannot tell apart.

    The score x·c - ‖c‖²/2 is largest at the nearest centroid. Taking the mean centroid m off first changes a row's
    scores by a constant and makes the numbers, hence the rounding, as small as the spread of the centroids.
    """

    def __init__(self, centroids: torch.Tensor):
        mean = centroids.mean(0).div(FIXED_POINT_UNIT).round().mul(FIXED_POINT_UNIT)
        centred = centroids - mean
        self._centroids = centroids.float()
        self._half_norms = centroids.square().sum(1) / 2
        self._matrix = centred.half() if centroids.is_cuda else centred.float()
        bias = mean.square().sum() / 2 - self._half_norms
        self._bias = bias.float()
        rounded_off = (centred - self._matrix.double()).norm(dim=1).max()
        magnitude = MAX_NORM * self._matrix.double().norm(dim=1).max() + bias.abs().max()
        error = MAX_NORM * rounded_off + product_error(centroids.shape[1] + 2, centroids.device) * magnitude
        self._slack = 2 * float(error)

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        scores = fast_product(embeddings, self._matrix).add_(self._bias)
        flat = flat_nonzero(scores >= (scores.amax(1) - self._slack).unsqueeze(1))
        rows, candidates = flat // len(self._centroids), flat % len(self._centroids)
        if len(rows) == len(embeddings):
            return candidates
        labels = torch.empty(len(embeddings), dtype=torch.int64, device=embeddings.device)
        labels[rows] = candidates
        contested = torch.bincount(rows, minlength=len(embeddings))[rows] > 1
        self._settle(embeddings, labels, rows[contested], candidates[contested])
        return labels

    def _settle(
        self, embeddings: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor
    ) -> None:
        scores = exact_products(embeddings, rows, self._centroids, candidates) - self._half_norms[candidates]
        best = torch.full((len(embeddings),), -torch.inf, dtype=torch.float64, device=embeddings.device)
        best.scatter_reduce_(0, rows, scores, "amax")
        winning = scores == best[rows]
        labels.scatter_reduce_(0, rows[winning], candidates[winning], "amin", include_self=False)


class _FaissFilter:
    """faiss's flat index finds the two nearest; rows where they are too close to call go through `_TorchFilter`."""

    def __init__(self, centroids: torch.Tensor):
        self._index = _flat_index(centroids)
        self._settle: Callable[[torch.Tensor], torch.Tensor] = _TorchFilter(centroids)
        norm = float(centroids.norm(dim=1).max())
        self._slack = 2 * product_error(centroids.shape[1] + 4, centroids.device) * (MAX_NORM + norm) ** 2

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        if self._index.ntotal == 1:
            return torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
        rows = embeddings.float()
        found = self._index.search(rows if rows.is_cuda else rows.numpy(), 2)
        distances, candidates = (torch.as_tensor(part) for part in found)
        labels = candidates[:, 0].clone()
        contested = flat_nonzero(distances[:, 1] - distances[:, 0] <= self._slack)
        labels[contested] = self._settle(embeddings[contested])
        return labels


def _flat_index(centroids: torch.Tensor) -> faiss.Index:
    index: faiss.IndexFlat | faiss.GpuIndexFlat
    if centroids.is_cuda:
        if faiss.get_num_gpus() == 0:
            raise ValueError(
                "engine='faiss' was asked for on a GPU, but faiss sees none; install faiss-gpu, or use engine='torch'"
            )
        import_module("faiss.contrib.torch_utils")  # patches faiss, for the whole process, to take tensors on a GPU
        config = faiss.GpuIndexFlatConfig()
        config.device = centroids.get_device()
        index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), centroids.shape[1], config)
    else:
        index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.float() if centroids.is_cuda else centroids.float().numpy())
    return index


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Keep oneDNN from multiplying float32 in bfloat16, which a process may have allowed for training."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = allowed


def _refuse(sample_ids: np.ndarray, fault: str, remedy: str) -> None:
    shown = ", ".join(str(i) for i in np.sort(sample_ids)[:_NUM_IDS_IN_ERROR])
    more = f" and {len(sample_ids) - _NUM_IDS_IN_ERROR} more" if len(sample_ids) > _NUM_IDS_IN_ERROR else ""
    raise ValueError(f"{len(sample_ids)} embeddings {fault}: sample ids {shown}{more}; {remedy}")
