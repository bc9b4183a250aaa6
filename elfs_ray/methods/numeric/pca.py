"""Principal components of a sample of embeddings, and the projection onto them."""

import numpy as np


def fit_pca(sample: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (d,) and the leading principal axes (num_components, d), float32, of an (n, d) sample.

    The coordinate of largest magnitude of every axis is positive. Memory: 8·n·d + 16·d² bytes.
    Raises ValueError where the sample has fewer rows or columns than components.
    """
    if not 1 <= num_components <= min(sample.shape):
        raise ValueError(
            f"{num_components} principal components need a sample with at least as many rows and columns, but it is "
            f"{sample.shape[0]} x {sample.shape[1]}; lower pca_dim or enlarge the sample"
        )
    mean = sample.mean(axis=0, dtype=np.float64)
    centered = sample - mean
    _, eigenvectors = np.linalg.eigh(centered.T @ centered)  # columns, by ascending eigenvalue
    axes = eigenvectors[:, ::-1][:, :num_components].T
    # An eigenvector's sign is arbitrary and differs between LAPACK libraries: fix it, so that machines agree.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    return mean.astype(np.float32), (axes * np.sign(largest)).astype(np.float32)


def project(embeddings: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Return the coordinates of (n, d) embeddings along principal axes, (n, k) float32, scaled to unit length."""
    coordinates = (embeddings.astype(np.float32) - mean) @ components.T
    # An embedding equal to the mean has no direction: dividing by the smallest float32 keeps its zeros.
    return coordinates / np.maximum(np.linalg.norm(coordinates, axis=1, keepdims=True), np.finfo(np.float32).tiny)
