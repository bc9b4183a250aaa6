"""Exact products and distances of unit-length embeddings, and fast products with a proven error bound.

Everything here is fixed-point arithmetic in disguise. Every float16 is a multiple of 2^-24, and centroids are rounded
to multiples of 2^-24, which float32 holds exactly for coordinates up to 1. Products of the two are multiples of 2^-48,
and for vectors of unit length their sums stay below 2^5, so they fit the 53 bits of a float64. Dot products and squared
distances in float64 are therefore exact: the same in any order of summation, on any device and with any library.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.sparse import csr_array

from elfs_ray.methods.numeric.workspace import Workspace

FIXED_POINT_UNIT = 2.0**-24  # the smallest positive float16, of which every other one is a multiple
MAX_NORM = 1.01  # a unit vector rounded to float16 is not exactly of length 1; 1% leaves room for any dimension
_PAIRS_PER_CHUNK = 1 << 15  # on a GPU, where their rows are gathered first


def to_fixed_point(values: np.ndarray) -> np.ndarray:
    """Round values to multiples of 2^-24 and return them as float32, exactly for |value| <= 1 as in centroids."""
    # Dividing and multiplying by a power of two rounds nothing, so rint is the only rounding.
    return (np.rint(np.asarray(values, dtype=np.float64) / FIXED_POINT_UNIT) * FIXED_POINT_UNIT).astype(np.float32)


def exact_centroids(centroids: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return centroids (k, d), rounded to multiples of 2^-24 where they are not yet, as float64 on a device.

    Raises ValueError for centroids that hold NaN or infinity.
    """
    if not np.isfinite(centroids).all():
        raise ValueError("centroids hold NaN or infinity; every coordinate must be a finite number")
    return torch.from_numpy(to_fixed_point(centroids)).to(device).double()


def squared_norms(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the exact squared norms (n,) float64 of embeddings (n, d) float16."""
    result = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    space = Workspace(embeddings.device)
    for rows in row_chunks(len(embeddings), embeddings.shape[1], embeddings.device):
        # A float16 has 11 significant bits, so its square has 22 and is exact in float32, at half of float64's traffic.
        squares = space.copy("rows", embeddings[rows], torch.float32).square_()
        torch.sum(space.copy("squares", squares, torch.float64), 1, out=result[rows])
    return result


def exact_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return float16, float32 or float64 rows as float64."""
    if rows.dtype == torch.float64:
        return rows
    # On a CPU torch converts float16 to float64 by way of float32 2.5 times faster than directly.
    return rows.float().double()


def row_chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows whose (rows, width) blocks stay in a CPU's cache, or are large enough to fill a GPU."""
    smallest, largest, elements = (1024, 2**18, 2**26) if device.type == "cuda" else (64, 1024, 2**22)
    size = min(largest, max(smallest, elements // width))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def select_rows(values: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Return some rows of values (n, d): a view for a slice, a copy for their positions."""
    # On a CPU torch's indexing copies float16 rows number by number, ten times slower than index_select.
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def fast_product(left: torch.Tensor, right: torch.Tensor, space: Workspace) -> torch.Tensor:
    """Multiply left (m, d) by the transpose of right (n, d) to (m, n) float32.

    Both are float16, on a CPU also float32. The error of an element is at most `product_error` times the two norms.
    The product lies in the workspace and is valid until the next one.
    """
    if left.is_cuda:
        # Tensor cores multiply float16 and add in float32. Without out_dtype the sum would be rounded to float16.
        return torch.mm(left, right.T, out_dtype=torch.float32)
    if left.dtype != torch.float32:
        left = space.copy("left", left, torch.float32)
    if right.dtype != torch.float32:
        right = space.copy("right", right, torch.float32)
    with _ieee_float32():
        return torch.mm(left, right.T, out=space.tensor("product", (len(left), len(right)), torch.float32))


def product_error(dim: int, device: torch.device) -> float:
    """Return a bound of the error of `fast_product`, relative to the norms of the two rows.

    It is Higham's γ = n·u / (1 - n·u) for n = dim + 4 roundings (Accuracy and Stability of Numerical Algorithms, 2002,
    section 3.1), which holds for any order of summation. Each product counts as a rounding even where it is exact.
    """
    # u is 2^-24 for float32 rounded to nearest. Tensor cores truncate, with only a few guard bits: 2^-22 covers that.
    roundings = (dim + 4) * (2.0**-22 if device.type == "cuda" else 2.0**-24)
    return roundings / (1 - roundings)


def flat_nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Return the flat positions of a mask's true elements, ascending."""
    if mask.is_cuda:
        return mask.flatten().nonzero().squeeze(1)
    # On a CPU numpy does this several times faster than torch.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def exact_products(
    left: torch.Tensor, left_rows: torch.Tensor, right: torch.Tensor, right_rows: torch.Tensor
) -> torch.Tensor:
    """Return the exact dot products (p,) float64 of the pairs of rows left[left_rows] · right[right_rows].

    left_rows must ascend. Memory on a CPU: 12 d bytes for every row of a matrix that is not float64 yet, used or not.
    """
    if left.is_cuda:
        result = torch.empty(len(left_rows), dtype=torch.float64, device=left.device)
        for pairs in _pair_chunks(len(left_rows)):
            result[pairs] = (exact_rows(left[left_rows[pairs]]) * exact_rows(right[right_rows[pairs]])).sum(1)
        return result
    # torch's sampled product reads rows where they are; gathering those of each pair takes longer than the arithmetic.
    # Pair by pair in the order of the right rows, which are read once and one after another. scipy sorts pairs in a
    # single pass, and its values say which pair went where.
    ends = np.bincount(left_rows.numpy(), minlength=len(left)).cumsum()
    by_left = (np.arange(len(left_rows)), right_rows.numpy(), np.append(0, ends))
    pairs = csr_array(by_left, shape=(len(left), len(right))).tocsc()
    starts, columns, pair = (torch.from_numpy(part).long() for part in (pairs.indptr, pairs.indices, pairs.data))
    zeros = torch.zeros(len(pair), dtype=torch.float64)
    with warnings.catch_warnings(action="ignore"):  # torch warns that sparse matrices are in beta
        places = torch.sparse_csr_tensor(starts, columns, zeros, size=(len(right), len(left)))
        products = torch.sparse.sampled_addmm(places, exact_rows(right), exact_rows(left).T, beta=0.0).values()
    return zeros.index_copy_(0, pair, products)


def _pair_chunks(num_pairs: int) -> Iterator[slice]:
    for start in range(0, num_pairs, _PAIRS_PER_CHUNK):
        yield slice(start, start + _PAIRS_PER_CHUNK)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Multiply float32 in full precision within the context, and restore the process's setting after it."""
    # A process may have let oneDNN multiply float32 in bfloat16 for training; then `product_error` would be no bound.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = allowed
