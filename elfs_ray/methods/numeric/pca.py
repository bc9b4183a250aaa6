"""Principal components of a sample of embeddings, and the embeddings along them."""

import numpy as np


def fit_pca(sample: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and leading principal axes (num_components, d), float32, of a (n, d) sample.

    An axis' sign is such that its largest coordinate is positive. Memory: 8·n·d + 16·d² bytes.
    Raises ValueError where the sample has fewer rows or columns than components.
    """
    if not 1 <= num_components <= min(sample.shape):
        raise ValueError(
            f"{num_components} principal components need a sample with at least as many rows and columns, got "
            f"{sample.shape[0]} x {sample.shape[1]}; lower pca_dim or enlarge the sample"
        )
    mean = sample.mean(axis=0, dtype=np.float64)
    centered = sample - mean
    axes = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :num_components].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    return mean.astype(np.float32), (axes * np.sign(largest)).astype(np.float32)


def project(embeddings: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Coordinates of (n, d) embeddings along principal axes, each row scaled to unit length, (n, k) float32."""
    coordinates = (embeddings.astype(np.float32) - mean) @ components.T
    return coordinates / np.maximum(np.linalg.norm(coordinates, axis=1, keepdims=True), np.finfo(np.float32).tiny)
