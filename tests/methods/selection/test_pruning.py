from fractions import Fraction

import numpy as np
import pytest

from elfs_ray.methods.selection.pruning import (
    allocate_evenly,
    balanced_windows,
    budget_count,
    floor_of_fraction,
    random_keys,
    random_selection,
    strata_of,
    stratified_keys,
    window_start,
)
from elfs_ray.methods.selection.quantiles import Cut, assign_parts, count_digits, hardness_keys, rank_to_cut
from tests.selections import balanced_double_end, dual_beta, hardest, stratified

GRID = [("0.1", ("0", "0.4", "0.9")), ("0.3", ("0", "0.15", "0.7")), ("0.5", ("0", "0.2", "0.5")), ("1", ("0",))]


def pool(n, seed=0, dtype=np.float32, num_values=7):
    """Scores with many ties and shuffled, sparse ids."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(num_values) if dtype == np.float32 else np.arange(-3, num_values - 3)
    return rng.choice(values, n).astype(dtype), rng.permutation(3 * n)[:n]


def select_by_shards(keys, ids, start, count, num_shards):
    """Select the same window from histograms of shards, as workers do."""
    shards = [(keys[shard::num_shards], ids[shard::num_shards]) for shard in range(num_shards)]
    lower, upper = rank_to_cut(
        lambda request: (count_digits(request, *shard) for shard in shards), [start, start + count], int(ids.max()) + 1
    )
    return np.concatenate([ids[assign_parts(keys, ids, [lower, upper]) == 0] for keys, ids in shards])


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 100, 1003, 100_000])
@pytest.mark.parametrize("direction", ["low", "high"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_the_window_over_shards_equals_sorting_and_slicing(n, direction, dtype):
    scores, ids = pool(n, n, dtype)
    order = np.lexsort((ids, scores if direction == "low" else -scores.astype(np.float64)))
    for kept, hard_fractions in GRID:
        count = int(Fraction(kept) * n)
        if count == 0:
            continue
        assert budget_count(float(kept), n) == count
        for hard_fraction in hard_fractions:
            start = window_start(n, count, float(hard_fraction))
            assert start == int(Fraction(hard_fraction) * n)
            num_shards = 1 + (n + start) % 7
            sharded = select_by_shards(hardness_keys(scores, direction), ids, start, count, num_shards)
            assert set(sharded) == set(ids[order[start : start + count]]) and sharded.size == count


def test_the_largest_and_smallest_hard_fraction_reach_both_ends():
    for kept, pruned in ((0.1, 0.9), (0.3, 0.7), (1 - 0.9, 0.9), (1 - 0.7, 0.7), (0.7, 1 - 0.7)):
        count = budget_count(kept, 1000)
        assert window_start(1000, count, pruned) + count == 1000
        assert window_start(1000, count, 0.0) == 0


@pytest.mark.parametrize("num_samples", [1, 3, 7, 10, 100, 1003, 50_000, 10**9])
def test_a_budget_keeps_the_floor_of_the_decimal_fraction_as_written(num_samples):
    for hundredths in range(1, 101):
        exact = int(Fraction(hundredths, 100) * num_samples)
        if exact:
            assert budget_count(hundredths / 100, num_samples) == exact
            assert floor_of_fraction(1 - (100 - hundredths) / 100, num_samples) == exact


def test_fractions_that_binary_floats_round_down_still_keep_their_count():
    assert budget_count(0.29, 100) == 29
    assert budget_count(0.1, 1000) == 100
    assert budget_count(1 / 3, 300) == 100
    assert budget_count(np.float64(0.57), 100) == 57


def test_an_integer_budget_is_a_count_and_a_float_a_fraction():
    assert budget_count(1, 50) == 1
    assert budget_count(1.0, 50) == 50
    assert budget_count(np.int64(50), 50) == 50


@pytest.mark.parametrize("budget", [0, -3, 51, 0.0, -0.1, 1.5, 50.0, 0.001, float("nan"), True, "0.1", None])
def test_a_budget_that_cannot_be_kept_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget is .* for a pool of 50 samples"):
        budget_count(budget, 50)


@pytest.mark.parametrize("hard_fraction", [-0.1, 0.91, 1.0, float("nan")])
def test_a_hard_fraction_beyond_what_is_pruned_is_refused(hard_fraction):
    with pytest.raises(ValueError, match=r"hard_fraction is .* keeping 10 of 100"):
        window_start(100, 10, hard_fraction)


def test_a_random_selection_refuses_duplicates_and_too_large_a_budget():
    _, ids = pool(20)
    twice = ids.copy()
    twice[4] = twice[5]
    with pytest.raises(ValueError, match="occur more than once"):
        random_selection(twice, 5, seed=0)
    with pytest.raises(ValueError, match="budget is 21 samples of a pool of 20"):
        random_selection(ids, 21, seed=0)


@pytest.mark.parametrize(
    ("counts", "budget", "expected"),
    [
        ([10, 2, 30], 12, [5, 2, 5]),  # 2 ≤ 12/3 gives all; 10 of ⌊10/2⌋ = 5; the largest takes the rest
        ([3, 3, 3], 8, [2, 3, 3]),  # ⌊8/3⌋, ⌊6/2⌋, 3: the remainder passes on
        ([0, 4, 0, 9], 7, [0, 3, 0, 4]),  # empty strata pass their share on
        ([1, 1, 100], 60, [1, 1, 58]),
        ([5, 1, 4], 10, [5, 1, 4]),
        ([7], 3, [3]),
        ([4, 4, 4], 1, [0, 0, 1]),
    ],
)
def test_the_budget_of_strata_is_the_published_allocation(counts, budget, expected):
    np.testing.assert_array_equal(allocate_evenly(np.array(counts), budget), expected)


def test_every_allocation_is_exact_and_takes_no_more_than_there_is():
    rng = np.random.default_rng(1)
    for _ in range(300):
        counts = rng.integers(0, 40, rng.integers(1, 60))
        if counts.sum():
            budget = int(rng.integers(1, counts.sum() + 1))
            allocation = allocate_evenly(counts, budget)
            assert allocation.sum() == budget
            assert (allocation <= counts).all()
            unfilled = allocation[allocation < counts]
            assert unfilled.size == 0 or unfilled.max() - unfilled.min() <= 1
    with pytest.raises(ValueError, match="budget of 4 cannot be met"):
        allocate_evenly(np.array([1, 2]), 4)


def test_strata_have_equal_width_and_number_from_the_hard_end():
    scores = np.array([0.0, 0.99, 1.0, 2.5, 9.9, 10.0], np.float32)
    np.testing.assert_array_equal(strata_of(scores, 0.0, 10.0, "low", 10), [0, 0, 1, 2, 9, 9])
    np.testing.assert_array_equal(strata_of(scores, 0.0, 10.0, "high", 10), [9, 9, 8, 7, 0, 0])
    np.testing.assert_array_equal(strata_of(np.full(3, 2.0, np.float32), 2.0, 2.0, "low", 10), [0, 0, 0])


@pytest.mark.parametrize("direction", ["low", "high"])
def test_stratified_drops_the_hardest_and_fills_every_stratum(direction):
    rng = np.random.default_rng(2)
    scores, ids = (rng.standard_normal(4000) ** 3).astype(np.float32), rng.permutation(9000)[:4000]
    positions = stratified(scores, ids, 700, 0.2, direction, seed=3)
    assert np.unique(positions).size == 700
    signed = scores.astype(np.float64) if direction == "low" else -scores.astype(np.float64)
    assert (np.diff(signed[positions]) >= 0).all()
    rest = np.lexsort((ids, signed))[800:]
    assert np.isin(positions, rest).all()
    edges = np.linspace(signed[rest].min(), signed[rest].max(), 51)
    counts = np.histogram(signed[rest], edges)[0]
    np.testing.assert_array_equal(np.histogram(signed[positions], edges)[0], allocate_evenly(counts, 700))


def test_stratified_keys_choose_the_same_samples_over_shards():
    rng = np.random.default_rng(3)
    scores, ids = rng.standard_normal(2000).astype(np.float32), rng.permutation(5000)[:2000]
    strata = strata_of(scores, float(scores.min()), float(scores.max()), "low", 50)
    counts = np.bincount(strata, minlength=50)
    keys, starts = stratified_keys(strata, ids, seed=9), np.cumsum(counts) - counts
    allocation = allocate_evenly(counts, 300)
    chosen = [
        select_by_shards(keys, ids, int(start), int(size), 3)
        for start, size in zip(starts, allocation, strict=True)
        if size
    ]
    assert set(np.concatenate(chosen)) == set(ids[stratified(scores, ids, 300, 0.0, "low", seed=9)])


def test_a_pool_of_one_score_is_one_stratum_sampled_at_random():
    ids = np.arange(500)
    positions = stratified(np.zeros(500, np.int32), ids, 50, 0.1, "low", seed=1)
    assert np.unique(positions).size == 50 and positions.min() >= 50
    assert np.ptp(positions) > 300  # not the first 50 of the rest


def test_random_choices_do_not_depend_on_the_order_of_the_samples():
    scores, ids = pool(800, num_values=300)
    shuffle = np.random.default_rng(5).permutation(800)
    prob = np.linspace(0, 1, 800, dtype=np.float32)
    for select in (
        lambda order: random_selection(ids[order], 90, seed=4),
        lambda order: stratified(scores[order], ids[order], 90, 0.1, "low", seed=4),
        lambda order: dual_beta(np.abs(scores)[order], prob[order], ids[order], 90, seed=4),
    ):
        straight, shuffled = select(np.arange(800)), select(shuffle)
        np.testing.assert_array_equal(ids[straight], ids[shuffle][shuffled])


def test_random_selection_is_nested_seeded_and_uniform():
    ids = np.arange(20_000)
    small, large = random_selection(ids, 1000, seed=0), random_selection(ids, 4000, seed=0)
    np.testing.assert_array_equal(small, large[:1000])
    assert 120 < np.intersect1d(small, random_selection(ids, 1000, seed=1)).size + 100 < 200  # 50 expected, σ = 6.9
    per_tenth = np.bincount(large // 2000, minlength=10)
    assert ((per_tenth - 400) ** 2 / 400).sum() < 30  # χ² of 9 degrees: 99.96%
    lower, upper = rank_to_cut(lambda request: [count_digits(request, random_keys(ids, 0), ids)], [0, 1000], ids.size)
    assert lower == Cut(0, 0)
    np.testing.assert_array_equal(
        np.sort(small), np.flatnonzero(assign_parts(random_keys(ids, 0), ids, [lower, upper]) == 0)
    )


def test_dual_beta_samples_with_the_published_weights():
    """One draw of three, repeated over seeds, against the weights worked out by hand.

    budget 1 of 3 prunes r = 2/3. The anchor is the mean over all three (fewer than ten): (0.2 + 0.5 + 0.8) / 3 = 0.5.
    b = 15 · 0.5 · (1 - (2/3)^4) = 6.0185, a = 16 - b = 9.9815.
    """
    dual, prob = np.array([0.9, 0.3, 0.1], np.float32), np.array([0.2, 0.5, 0.8], np.float32)
    a, b = 9.981481, 6.018519
    weights = dual * prob ** (a - 1) * (1 - prob) ** (b - 1)
    draws = np.array([dual_beta(dual, prob, np.arange(3), 1, seed=seed)[0] for seed in range(4000)])
    observed = np.bincount(draws, minlength=3) / 4000
    np.testing.assert_allclose(observed, weights / weights.sum(), atol=0.03)


def test_dual_beta_leans_to_easy_samples_as_more_is_pruned():
    rng = np.random.default_rng(8)
    prob = rng.random(20_000).astype(np.float32)
    dual = (prob * (1 - prob) ** 2).astype(np.float32)  # highest at a mean of 1/3
    means = [
        prob[dual_beta(dual, prob, np.arange(20_000), count, seed=0)].mean() for count in (14_000, 6000, 2000, 200)
    ]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


def test_dual_beta_is_exact_where_few_samples_have_weight():
    dual = np.zeros(100, np.float32)
    dual[[7, 50]] = 0.2
    prob = np.concatenate([np.zeros(50), np.ones(50)]).astype(np.float32)
    positions = dual_beta(dual, prob, np.arange(100), 30, seed=0)
    assert np.unique(positions).size == 30
    assert set(positions[:2]) == {7, 50}
    np.testing.assert_array_equal(np.sort(dual_beta(dual, prob, np.arange(100), 100, seed=0)), np.arange(100))


def test_dual_beta_refuses_values_that_are_not_probabilities():
    ids = np.arange(3)
    with pytest.raises(ValueError, match="mean_prob must hold probabilities"):
        dual_beta(np.ones(3, np.float32), np.array([0.1, 0.2, 1.5], np.float32), ids, 1, seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        dual_beta(np.array([0.1, -0.2, 0.1], np.float32), np.full(3, 0.5, np.float32), ids, 1, seed=0)


def test_balance_divides_the_budget_evenly_as_far_as_classes_have_samples():
    rng = np.random.default_rng(10)
    scores, ids = pool(1000, num_values=400)
    labels = rng.choice([0, 1, 5], 1000, p=[0.05, 0.35, 0.6])
    small = int((labels == 0).sum())
    positions = balanced_double_end(scores, ids, labels, 301, 0.0, "low")
    shares = [int((labels[positions] == label).sum()) for label in (0, 1, 5)]
    assert shares == [small, (301 - small) // 2, 301 - small - (301 - small) // 2]
    assert (np.diff(scores[positions]) >= 0).all()
    for label, share in zip((1, 5), shares[1:], strict=True):
        members = np.flatnonzero(labels == label)
        expected = members[hardest(scores[members], ids[members], share, "low")]
        assert set(positions[labels[positions] == label]) == set(expected)


def test_each_class_drops_its_hard_fraction_but_fills_its_budget_first():
    scores, ids = pool(100)
    labels = np.repeat([0, 3], [90, 10])
    starts, shares = balanced_windows(np.array([90, 0, 0, 10]), 16, 0.4)
    assert starts.tolist() == [36, 0, 0, 2] and shares.tolist() == [8, 0, 0, 8]
    positions = balanced_double_end(scores, ids, labels, 16, 0.4, "low")
    for label, start in ((0, 36), (3, 2)):
        members = np.flatnonzero(labels == label)
        order = members[np.lexsort((ids[members], scores[members]))]
        assert set(positions[labels[positions] == label]) == set(order[start : start + 8])
    with pytest.raises(ValueError, match=r"hard_fraction is 0\.9"):
        balanced_windows(np.array([90, 0, 0, 10]), 16, 0.9)
