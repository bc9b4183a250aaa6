"""Near-duplicates: a member is similar to its representative itself, and no two representatives are similar."""

import networkx
import numpy as np
import pytest

from elfs_ray.methods import near_duplicates
from elfs_ray.methods.near_duplicates import components, divide, representatives


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def one_by_one(embeddings: np.ndarray, threshold: float) -> tuple[list[int], list[float]]:
    """Return the representatives and similarities as their definition says, a sample at a time."""
    rows = embeddings.astype(np.float64)
    kept: list[int] = []
    chosen, best = [], []
    for i, row in enumerate(rows):
        similarity = rows[kept] @ row
        if len(kept) and similarity.max() >= threshold:
            chosen.append(kept[int(similarity.argmax())])
            best.append(float(similarity.max()))
        else:
            kept.append(i)
            chosen.append(i)
            best.append(1.0)
    return chosen, best


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 1.0])
def test_representatives_are_those_of_the_definition_in_any_blocks(monkeypatch, block, threshold):
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, 16))
    embeddings = unit(centres[rng.integers(0, 12, 200)] + 0.25 * rng.standard_normal((200, 16)))
    embeddings[50:60] = embeddings[3]
    chosen, best = representatives(embeddings, threshold)
    expected, similarity = one_by_one(embeddings, threshold)
    assert chosen.tolist() == expected
    np.testing.assert_allclose(best, similarity, rtol=1e-12)
    assert 12 <= len(set(expected)) < 200 or threshold == 1.0


def test_the_frames_of_a_film_get_several_representatives():
    angles = np.linspace(0, np.pi / 2, 91)  # each frame is a degree from the next
    frames = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    chosen, best = representatives(frames, np.cos(np.radians(9.5)))
    kept = np.unique(chosen)
    assert kept.tolist() == list(range(0, 91, 10))
    assert best.min() >= np.cos(np.radians(9.5))


def test_components_are_those_of_the_graph():
    rng = np.random.default_rng(1)
    left, right = rng.choice(10**12, 300)[rng.integers(0, 300, (2, 150))]
    expected = networkx.connected_components(networkx.Graph(list(zip(left.tolist(), right.tolist(), strict=True))))
    assert [part.tolist() for part in components(left, right)] == sorted(map(sorted, expected))
    assert components(np.empty(0, np.int64), np.empty(0, np.int64)) == []


def test_components_are_divided_one_by_one():
    rng = np.random.default_rng(2)
    sizes = [2, 5, 2, 3, 2, 2]
    embeddings = unit(np.ones(4) + 0.3 * rng.standard_normal((sum(sizes), 4)))
    chosen, best = divide(embeddings, sizes, 0.95)
    for first, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        expected, similarity = one_by_one(embeddings[first : first + size], 0.95)
        assert (chosen[first : first + size] - first).tolist() == expected
        np.testing.assert_allclose(best[first : first + size], similarity, rtol=1e-12)
    pairs = np.array([1, 8, 13, 15])
    assert 0 < (chosen[pairs] == pairs).sum() < 4
