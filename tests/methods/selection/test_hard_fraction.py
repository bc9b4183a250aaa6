"""The estimate of the hard fraction, against its formula written out over sorted samples."""

from itertools import pairwise

import numpy as np
import pytest

from elfs_ray.methods.selection.hard_fraction import count_difficulty, estimate_risks, fraction_grid, least_risk
from tests.selections import balanced_double_end, double_end


def pool(n=4000, seed=0):
    """Scores, and probabilities that rise with them: many easy samples and a tail of hard ones."""
    rng = np.random.default_rng(seed)
    probs = rng.beta(4, 1.5, n).astype(np.float32)
    scores = (probs * 20 + rng.normal(0, 2, n)).astype(np.float32)
    return scores, probs


def risks_of(scores, probs, count, *, groups=None, direction="low", num_classes=10):
    groups = np.zeros(scores.size, np.int64) if groups is None else groups
    score_range = float(scores.min()), float(scores.max())
    sums = count_difficulty(scores, groups, probs, score_range, direction, int(groups.max()) + 1)
    return estimate_risks(sums, count, num_classes)


def test_the_grid_holds_the_decimal_multiples_up_to_what_is_pruned_itself():
    assert fraction_grid(0.1, 400, 4000) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert fraction_grid(0.1, 401, 4000)[-1] == 0.8
    assert fraction_grid(0.3, 1, 10) == [0.0, 0.3, 0.6, 0.9]
    assert fraction_grid(0.1, 5, 5) == [0.0]
    assert fraction_grid(0.01, 1, 3)[-1] == 0.66


@pytest.mark.parametrize("count", [40, 400, 1200])
@pytest.mark.parametrize("num_groups", [1, 5])
def test_risks_are_those_of_the_window_that_is_kept(count, num_groups):
    scores, probs = pool()
    groups, ids = np.arange(scores.size) % num_groups, np.arange(scores.size)
    q = probs.astype(np.float64)
    for risk in risks_of(scores, probs, count, groups=groups)[::10]:
        beta = risk.hard_fraction
        if num_groups == 1:
            kept = double_end(scores, ids, count, beta, "low")
        else:
            kept = balanced_double_end(scores, ids, groups, count, beta, "low")
        assert risk.bias == pytest.approx(q[kept].mean() - q.mean(), abs=0.01)
        assert risk.variance == pytest.approx((q[kept] * (1 - q[kept])).mean() * 10 / count, rel=0.05, abs=0.002)
        assert risk.risk == risk.bias**2 + risk.variance


def test_a_score_whose_high_end_is_hard_gives_the_same_as_its_negative():
    scores, probs = pool()
    low, high = risks_of(scores, probs, 300), risks_of(-scores, probs, 300, direction="high")
    np.testing.assert_allclose(np.array(low), np.array(high), atol=1e-3)


def test_sums_are_the_same_for_any_division_of_the_samples():
    scores, probs = pool(999)
    groups, score_range = np.arange(999) % 3, (float(scores.min()), float(scores.max()))
    whole = count_difficulty(scores, groups, probs, score_range, "low", 3)
    parts = np.array_split(np.random.default_rng(1).permutation(999), 4)
    divided = sum(count_difficulty(scores[p], groups[p], probs[p], score_range, "low", 3) for p in parts)
    np.testing.assert_array_equal(whole, divided)
    assert whole[0].sum() == 999


def test_the_hard_fraction_falls_as_the_budget_grows_and_always_fits():
    scores, probs = pool()
    fractions = [least_risk(risks_of(scores, probs, count)) for count in (20, 200, 400, 1200, 2400, 3600)]
    assert all(a > b for a, b in pairwise(fractions)), fractions
    for count in (1, 7, 3999, 4000):
        assert 0 <= least_risk(risks_of(scores, probs, count)) <= 1 - count / 4000


def test_large_budgets_lie_around_the_mean_and_small_ones_at_the_easy_end():
    scores, probs = pool()
    many = least_risk(risks_of(scores, probs, 400, num_classes=1))
    kept = double_end(scores, np.arange(4000), 400, many, "low")
    assert probs[kept].mean() == pytest.approx(probs.mean(), abs=0.02)
    few = least_risk(risks_of(scores, probs, 400, num_classes=400))
    assert few == 0.7  # the window ends where the easiest fifth begins


def test_equal_scores_and_a_single_sample_give_a_fraction_that_fits():
    equal, ones = np.zeros(100, np.float32), np.ones(100, np.float32)
    _, probs = pool(100)
    assert least_risk(risks_of(equal, probs, 10)) == 0
    assert least_risk(risks_of(np.arange(100, dtype=np.int32), ones, 10)) == 0
    assert least_risk(risks_of(equal[:1], probs[:1], 1)) == 0
