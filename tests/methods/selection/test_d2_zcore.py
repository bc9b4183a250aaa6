"""D2 and ZCore against plain implementations of their papers, on real digits and on cases worked by hand."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.methods.selection.d2 import d2_selection
from elfs_ray.methods.selection.zcore import zcore_draws, zcore_sum, zcore_votes
from tests.selections import hardest


def clustered_embeddings(n, dim=16, num_clusters=5, seed=0):
    """Unit vectors in clusters of unequal density, as stored: float16."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_clusters, dim))
    label = rng.integers(0, num_clusters, n)
    points = centers[label] + 0.15 * (1 + label[:, None]) * rng.standard_normal((n, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)


def digit_embeddings():
    """scikit-learn's 1,797 real digits as the encoder `pixels` embeds them: less their mean, unit length, float16."""
    pixels = load_digits().data
    pixels = pixels - pixels.mean(1, keepdims=True)
    return (pixels / np.linalg.norm(pixels, axis=1, keepdims=True)).astype(np.float16)


def neighbors_of(embeddings, k):
    exact = embeddings.astype(np.float64)
    cosine = exact @ exact.T
    np.fill_diagonal(cosine, -np.inf)
    neighbors = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return neighbors, np.take_along_axis(cosine, neighbors, axis=1).astype(np.float32)


def test_d2_on_four_samples_worked_by_hand():
    """A and B coincide (cosine 1); C stands at 90° of A; D is C's opposite, so d² = 0, 2, 4; one neighbour each.

    forward, all 1: A = 1 + e⁰ = 2, B = 2, C = 1 + e⁻² (to A), D = 1 + e⁻⁴ (to C).
    A is taken first and B falls to 2 - e⁰ · 2 = 0; then C (1.135), which takes e⁻² · 1.135 from A, gone already;
    then D (1.018); then B.
    """
    neighbors, similarity = np.array([[1], [0], [0], [2]]), np.array([[1], [1], [0], [-1]], np.float32)
    np.testing.assert_array_equal(d2_selection(neighbors, similarity, 4), [0, 2, 3, 1])


def test_d2_lets_a_neighbour_of_a_taken_sample_wait():
    """A and B are near neighbours, C and D stand at 90° of A.

    forward: A = B = 1 + e^-0.2 = 1.819, C = D = 1 + e⁻² = 1.135. A is taken first and B falls to 0.330, behind both.
    """
    neighbors, similarity = np.array([[1], [0], [0], [0]]), np.array([[0.9], [0.9], [0], [0]], np.float32)
    np.testing.assert_array_equal(d2_selection(neighbors, similarity, 4), [0, 2, 3, 1])


def plain_d2(neighbors, similarity, budget):
    squared = np.maximum(2 - 2 * similarity.astype(float), 0)
    score = [1 + sum(np.exp(-squared[i])) for i in range(len(neighbors))]
    left, taken = set(range(len(score))), []
    for _ in range(budget):
        best = max(left, key=lambda i: (score[i], -i))
        left.remove(best)
        taken.append(best)
        for column, neighbor in enumerate(neighbors[best]):
            if neighbor in left:
                score[neighbor] -= np.exp(-squared[best, column]) * score[best]
    return taken


def test_d2_takes_the_samples_of_a_plain_implementation_in_order():
    neighbors, similarity = neighbors_of(clustered_embeddings(400), 8)
    expected = plain_d2(neighbors, similarity, 300)
    np.testing.assert_array_equal(d2_selection(neighbors, similarity, 300), expected)


def test_d2_takes_every_sample_once_when_the_budget_is_the_pool():
    neighbors, similarity = neighbors_of(clustered_embeddings(300), 5)
    np.testing.assert_array_equal(np.sort(d2_selection(neighbors, similarity, 300)), np.arange(300))


def test_d2_breaks_ties_by_position_and_works_on_one_sample():
    neighbors, similarity = np.zeros((5, 0), np.int64), np.zeros((5, 0), np.float32)
    np.testing.assert_array_equal(d2_selection(neighbors, similarity, 3), [0, 1, 2])
    np.testing.assert_array_equal(d2_selection(neighbors[:1], similarity[:1], 1), [0])


def test_d2_refuses_what_does_not_fit():
    neighbors, similarity = np.array([[1], [0]]), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match="must both be"):
        d2_selection(neighbors, similarity[:1], 1)
    with pytest.raises(ValueError, match="positions 0 to 1"):
        d2_selection(neighbors + 1, similarity, 1)
    with pytest.raises(ValueError, match="budget is 3 samples of a pool of 2"):
        d2_selection(neighbors, similarity, 3)


def plain_zcore_votes(embeddings, num_draws, seed):
    """ZCore's loop as published, with full sorts. Its random draws are hashes by the definition of ours."""
    points = embeddings.astype(np.float32)
    n, num_dims = points.shape
    votes = np.zeros(n)
    for draw in range(num_draws):
        first = int(hash_uniform(seed, 1, draw, 0) * num_dims)
        second = int(hash_uniform(seed, 1, draw, 1) * (num_dims - 1))
        pair = [first, second + (second >= first)]
        at = []
        for axis, dim in enumerate(pair):
            low, high = float(points[:, dim].min()), float(points[:, dim].max())
            mode, u = float(np.median(points[:, dim])), float(hash_uniform(seed, 2, draw, axis))
            if u < (mode - low) / (high - low):
                at.append(low + np.sqrt(u * (high - low) * (mode - low)))
            else:
                at.append(high - np.sqrt((1 - u) * (high - low) * (high - mode)))
        plane = points[:, pair]
        covering = int(np.argmin(np.abs(plane - np.array(at, np.float32)).sum(axis=1)))
        votes[covering] += 1
        distance = np.abs(plane - plane[covering]).sum(axis=1)
        ranked = [i for i in np.argsort(distance, kind="stable") if i != covering][:1000]
        if distance[ranked[0]] == 0:
            votes[ranked[0]] -= 1
        else:
            penalty = distance[ranked].astype(float) ** -4.0
            votes[ranked] -= penalty / penalty.sum()
    return votes


def zcore_scores(embeddings, sample_ids, seed, num_draws):
    return zcore_sum(sample_ids, [zcore_votes(embeddings, draws, seed) for draws in zcore_draws(num_draws)], seed)


@pytest.mark.parametrize("n", [2, 50, 1001, 6000])
def test_zcore_votes_equal_those_of_a_plain_implementation(n):
    embeddings = clustered_embeddings(n)
    votes = zcore_votes(embeddings, range(200), 5)
    np.testing.assert_allclose(votes, plain_zcore_votes(embeddings, 200, 5), atol=1e-5)


def test_zcore_finds_all_neighbours_where_near_and_far_alternate():
    """Every other sample is far, so the distances that are probed are those of near samples alone, or of far ones."""
    rng = np.random.default_rng(4)
    embeddings = rng.uniform(0.4, 0.41, (5000, 3)).astype(np.float32)
    embeddings[1::2] -= 0.8
    votes = zcore_votes(embeddings, range(20), 0)
    np.testing.assert_allclose(votes, plain_zcore_votes(embeddings, 20, 0), atol=1e-5)


def test_zcore_triangular_points_stay_in_range_and_peak_at_the_median():
    """With one draw a call, the covering sample of a fine one-dimensional grid tells where the point fell."""
    grid = np.linspace(0, 1, 1001)
    embeddings = np.stack([grid**2, np.zeros(1001)], axis=1).astype(np.float32)  # range 0 to 1, median 0.25
    fell = np.array([grid[zcore_votes(embeddings, range(i, i + 1), 0).argmax()] ** 2 for i in range(2000)])
    assert fell.mean() == pytest.approx((0 + 0.25 + 1) / 3, abs=0.02)
    assert (fell < 0.25).mean() == pytest.approx(0.25, abs=0.04)


def test_zcore_prefers_lone_samples_to_copies():
    rng = np.random.default_rng(3)
    lone = rng.uniform(-1, 1, (40, 6))
    copies = np.repeat(rng.uniform(-1, 1, (2, 6)), 30, axis=0) + rng.normal(0, 1e-3, (60, 6))
    scores = zcore_scores(np.concatenate([lone, copies]).astype(np.float32), np.arange(100), seed=0, num_draws=3000)
    assert np.median(scores[:40]) > np.median(scores[40:])
    kept = hardest(scores, np.arange(100), 30, "high")
    assert (kept < 40).mean() > 0.8


def test_a_coinciding_sample_takes_the_whole_penalty_alone():
    embeddings = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.25, 0.25]], np.float16)
    votes = {tuple(zcore_votes(embeddings, range(draw, draw + 1), 0).tolist()) for draw in range(100)}
    assert votes == {(1, -1, 0, 0), (-1 / 3, -1 / 3, -1 / 3, 1)}


def test_zcore_scores_span_zero_to_one_and_add_all_votes():
    embeddings, ids = clustered_embeddings(60), np.arange(60) + 1000
    draws = zcore_draws(100_001)
    assert [(part.start, part.stop) for part in draws] == [(0, 50_000), (50_000, 100_000), (100_000, 100_001)]
    scores = zcore_scores(embeddings, ids, seed=2, num_draws=500)
    assert scores.dtype == np.float32 and scores.min() == 0 and scores.max() == 1
    raw = hash_uniform(2, 3, ids) + zcore_votes(embeddings, range(500), 2)
    np.testing.assert_allclose(scores, (raw - raw.min()) / np.ptp(raw), atol=1e-6)


def test_zcore_refuses_too_few_samples_dimensions_or_draws():
    with pytest.raises(ValueError, match="at least 2 samples and 2 dimensions"):
        zcore_votes(np.ones((1, 4), np.float16), range(3), 0)
    with pytest.raises(ValueError, match="num_draws is 0"):
        zcore_draws(0)


def test_both_baselines_order_digits_as_plain_implementations_do():
    """Sums of another order aside: what ZCore keeps later is never better by more than rounding."""
    embeddings = digit_embeddings()
    ids = np.arange(len(embeddings))
    neighbors, similarity = neighbors_of(embeddings, 10)
    np.testing.assert_array_equal(d2_selection(neighbors, similarity, 300), plain_d2(neighbors, similarity, 300))

    scores = zcore_scores(embeddings, ids, seed=0, num_draws=300)
    plain = hash_uniform(0, 3, ids) + plain_zcore_votes(embeddings, 300, 0)
    assert (np.diff(plain[hardest(scores, ids, ids.size, "high")]) <= 1e-4).all()
