"""Exact products and distances of unit-length embeddings, and fast ones with a proven error.

Everything here is fixed-point arithmetic in disguise. A float16 is a multiple of 2^-24, and centroids are rounded to
multiples of 2^-24, which for coordinates up to 1 are float32 values. Products of the two are multiples of 2^-48 and,
for vectors of unit length, sums of them stay below 2^5: they fit the 53 bits of a float64. So float64 dot products and
squared distances are exact, and independent of the order of summation, of the device and of the library.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from elfs_ray.methods.numeric.workspace import Workspace

FIXED_POINT_UNIT = 2.0**-24
MAX_NORM = 1.01
_SETTLE_PAIRS = 512


def to_fixed_point(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 2^-24, as float32: exact for |value| <= 1, the coordinates of centroids."""
    return (np.rint(np.asarray(values, dtype=np.float64) / FIXED_POINT_UNIT) * FIXED_POINT_UNIT).astype(np.float32)


def exact_centroids(centroids: np.ndarray, device: torch.device) -> torch.Tensor:
    """Centroids (k, d), rounded to multiples of 2^-24 if they are not yet, as float64 on a device."""
    if not np.isfinite(centroids).all():
        raise ValueError("centroids hold NaN or infinity; every coordinate must be a finite number")
    return torch.from_numpy(to_fixed_point(centroids)).to(device).double()


def squared_norms(embeddings: torch.Tensor) -> torch.Tensor:
    """Exact squared norms (n,) float64 of embeddings (n, d) float16."""
    result = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    space = Workspace(embeddings.device)
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        squares = space.copy("rows", embeddings[rows], torch.float32).square_()  # of 11 bits: exact in float32
        torch.sum(space.copy("squares", squares, torch.float64), 1, out=result[rows])
    return result


def exact_rows(rows: torch.Tensor) -> torch.Tensor:
    """float16 or float32 rows as float64; on a CPU the way over float32 is 2.5 times faster than torch's direct one."""
    return rows.float().double()


def row_chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that keep a (rows, width) block in a CPU's cache, or large enough to fill a GPU."""
    smallest, largest, elements = (1024, 2**18, 2**26) if device.type == "cuda" else (64, 1024, 2**22)
    size = min(largest, max(smallest, elements // width))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def fast_product(left: torch.Tensor, right: torch.Tensor, space: Workspace) -> torch.Tensor:
    """left (m, d) times the transpose of right (n, d) as float32 (m, n): on float16 tensor cores, or by a CPU's sgemm.

    Both are float16; on a CPU float32 will do. The error of an element is at most `product_error` times both norms.
    The product lies in the workspace and holds until the next one.
    """
    if left.is_cuda:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    if left.dtype != torch.float32:
        left = space.copy("left", left, torch.float32)
    if right.dtype != torch.float32:
        right = space.copy("right", right, torch.float32)
    with _ieee_float32():
        return torch.mm(left, right.T, out=space.tensor("product", (len(left), len(right)), torch.float32))


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
    for pairs in _pair_chunks(len(left_rows), left.device):
        result[pairs] = (exact_rows(left[left_rows[pairs]]) * exact_rows(right[right_rows[pairs]])).sum(1)
    return result


def _pair_chunks(num_pairs: int, device: torch.device) -> Iterator[slice]:
    size = _SETTLE_PAIRS * (64 if device.type == "cuda" else 1)
    for start in range(0, num_pairs, size):
        yield slice(start, start + size)


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
