"""The layout of the map keeps images of a class together."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from elfs_ray.methods.numeric.layout import lay_out


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    vectors = images[:count] - images[:count].mean(axis=1, keepdims=True)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels[:count]


def accuracy(points: np.ndarray, labels: np.ndarray) -> float:
    return cross_val_score(KNeighborsClassifier(10), points, labels, cv=5).mean()


def test_classes_lie_apart_that_overlap_by_principal_components():
    vectors, labels = digits(800)
    points = lay_out(vectors, np.arange(800) % 2 == 0)
    assert points.shape == (800, 2) and points.dtype == np.float32
    assert accuracy(points, labels) > 0.85 > accuracy(PCA(2).fit_transform(vectors), labels) + 0.1


def test_the_same_vectors_get_the_same_places():
    vectors, _ = digits(50)
    first, second = (lay_out(vectors, np.ones(50, bool)) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
def test_few_or_equal_vectors_have_places(count):
    vectors, _ = digits(count)
    equal = np.repeat(vectors[:1], count, axis=0)
    assert np.isfinite(lay_out(vectors, np.ones(count, bool))).all()
    assert (lay_out(equal, np.ones(count, bool)) == 0).all()
