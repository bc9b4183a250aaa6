"""Facility location against a plain greedy selection, on real digits and on degenerate pools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from elfs_ray.methods.selection.coverage import (
    SIMILARITY_ONE,
    centred,
    facility_location,
    highest_similarity,
    sum_of,
)


def digit_embeddings(num_rows):
    """Some of scikit-learn's 1,797 digits, less their mean."""
    pixels = load_digits().data[:num_rows]
    return (pixels - pixels.mean(0)).astype(np.float16)


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def float_similarity(candidates, points):
    """The Gaussian kernel as its formula says, (m, n) float64."""
    return np.exp(unit(candidates) @ unit(points).T - 1)


def integer_similarity(candidates, points):
    """The kernel that is documented: of vectors rounded to 2^-12, in steps of 2^-15 of a cosine, as an integer."""
    length = 1 - np.sqrt(points.shape[1]) / 8192
    left, right = (np.rint(unit(rows) * (length * 4096)).astype(np.int64) for rows in (candidates, points))
    step = np.rint((left @ right.T) / 512)  # products are in units of 2^-24, and 512 of them are a step
    cosine = step / (2**15 * length**2)
    return np.rint(np.exp(np.minimum(cosine, 1) - 1) * SIMILARITY_ONE).astype(np.int64)


def plain_greedy(similarity, budget, covered=0):
    """Evaluate every candidate before each choice. Returns (order, gains)."""
    covered = np.zeros(similarity.shape[1], np.int64) + covered
    left, order, gains = list(range(len(similarity))), [], []
    for _ in range(budget):
        totals = np.maximum(similarity[left] - covered, 0).sum(axis=1)
        best = left.pop(int(totals.argmax()))  # argmax takes the first of equals, the lowest position
        order.append(best)
        gains.append(totals.max())
        covered = np.maximum(covered, similarity[best])
    return order, gains


def assert_selected(coverage, order, gains):
    np.testing.assert_array_equal(coverage.order, order)
    np.testing.assert_array_equal(coverage.gains, gains)


def test_the_selection_and_its_gains_are_those_of_a_plain_greedy_selection():
    digits = digit_embeddings(1200)
    assert_selected(facility_location(digits, 300), *plain_greedy(integer_similarity(digits, digits), 300))


def test_the_objective_is_that_of_a_selection_in_floating_point():
    digits = digit_embeddings(600)
    exact = float_similarity(digits, digits)
    best = exact[plain_greedy(exact, 40)[0]].max(axis=0).mean()
    ours = facility_location(digits, 40)
    assert exact[ours.order].max(axis=0).mean() == pytest.approx(best, rel=2e-3)
    assert ours.gains.sum() / (SIMILARITY_ONE * 600) == pytest.approx(best, rel=2e-3)
    assert highest_similarity(digits, digits[ours.order]).sum() == ours.gains.sum()


def test_without_a_choice_nothing_is_covered():
    digits = digit_embeddings(20)
    assert highest_similarity(digits, digits[:0]).tolist() == [0] * 20


small_pools = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        # Few values, so that equal points, ties and opposite points are frequent.
        st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@settings(deadline=None, max_examples=200)
@given(small_pools)
def test_small_pools_with_many_ties_are_selected_as_by_a_plain_greedy_selection(pool_and_budget):
    rows, budget = pool_and_budget
    points = np.array(rows, np.float16)
    similarity = integer_similarity(points, points)
    coverage = facility_location(points, budget)
    order, gains = plain_greedy(similarity, budget)
    assert_selected(coverage, order, gains)
    assert (np.diff(coverage.gains) <= 0).all()
    covered = np.zeros(len(points), np.int64)
    for step, choice in enumerate(coverage.order):
        # A choice that equals an earlier one, or gains nothing, comes only once every sample is covered.
        if any((unit(points[[choice]]) == unit(points[[earlier]])).all() for earlier in coverage.order[:step]):
            assert (covered >= similarity.diagonal()).all()
        covered = np.maximum(covered, similarity[choice])


def test_every_prefix_of_a_selection_is_the_selection_of_a_smaller_budget():
    digits = digit_embeddings(500)
    whole = facility_location(digits, 500)
    assert sorted(whole.order) == list(range(500))
    for budget in (1, 7, 100):
        assert_selected(facility_location(digits, budget), whole.order[:budget], whole.gains[:budget])


def test_the_order_of_the_rows_and_their_lengths_do_not_matter():
    """A shuffled pool is divided into other blocks of products. So early no two gains are equal and no tie decides."""
    digits = digit_embeddings(1100).astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(1100)
    ours = facility_location(digits, 50)
    other = facility_location(digits[shuffled] * 8, 50)
    assert_selected(ours, shuffled[other.order], other.gains)


def test_equal_points_are_selected_once_and_then_by_position():
    points = np.ones((6, 4), np.float16)
    coverage = facility_location(points, 6)
    assert_selected(coverage, range(6), [coverage.gains[0], 0, 0, 0, 0, 0])
    assert coverage.gains[0] == pytest.approx(6 * SIMILARITY_ONE, rel=1e-3)


def test_a_pool_of_one_point():
    coverage = facility_location(np.array([[3.0, 4.0]], np.float32), 1)
    assert coverage.order.tolist() == [0]
    assert coverage.gains[0] == pytest.approx(SIMILARITY_ONE, rel=1e-3)


def test_candidates_other_than_the_points():
    digits = digit_embeddings(1300)
    points, candidates = digits[:700], digits[700:]
    expected = plain_greedy(integer_similarity(candidates, points), 50)
    assert_selected(facility_location(points, 50, candidates=candidates), *expected)


def test_points_that_are_covered_already_attract_no_choice():
    digits = digit_embeddings(900)
    covered_by = digits[::3]
    similarity = integer_similarity(digits, digits)
    expected = plain_greedy(similarity, 60, covered=similarity[::3].max(axis=0))
    ours = facility_location(digits, 60, covered_by=covered_by)
    assert_selected(ours, *expected)
    assert not set(ours.order) & set(range(0, 900, 3))


def test_points_are_covered_by_their_group_alone():
    digits = digit_embeddings(1203)  # more than two blocks of similarities
    groups = np.random.default_rng(0).integers(0, 5, len(digits))
    similarity = integer_similarity(digits, digits) * (groups[:, None] == groups)
    expected = plain_greedy(similarity, 50)
    assert_selected(facility_location(digits, 50, groups=groups), *expected)
    assert_selected(facility_location(digits, 50, candidates=digits, groups=groups, candidate_groups=groups), *expected)
    assert set(groups[expected[0][:5]]) == set(range(5))


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (np.ones((3, 2), np.float16), {"budget": 4}, "budget is 4 of 3 candidates"),
        (np.ones((3, 2), np.float16), {"budget": 0}, "budget is 0 of 3 candidates"),
        (np.ones((0, 2), np.float16), {"budget": 1}, "0 points to be covered"),
        (np.array([[1.0, 0], [0, 0]]), {"budget": 1}, "a zero vector"),
        (np.array([[1.0, 0], [np.nan, 0]]), {"budget": 1}, "NaN"),
        (np.ones((3, 2)), {"budget": 1, "candidates": np.ones((3, 3))}, "embeddings are"),
        (np.ones((3, 2)), {"budget": 1, "groups": np.zeros(2, int)}, r"groups are \(2,\); must be \(3,\)"),
    ],
)
def test_what_cannot_be_selected_is_refused(points, arguments, message):
    with pytest.raises(ValueError, match=message):
        facility_location(points, **arguments)


def test_what_all_embeddings_share_is_gone_once_they_are_centred():
    random = np.random.default_rng(0).normal(size=(700, 32))
    unit = unit_float16(random + 25 * np.eye(1, 32, 5))
    centre = sum_of(unit) / len(unit)
    assert np.array_equal(centre, unit.astype(np.float64).mean(0))
    rows = centred(unit, centre)
    expected = unit - unit.astype(np.float64).mean(0)
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3)
    cosines, before = (float((each.astype(np.float64) @ each.T.astype(np.float64)).mean()) for each in (rows, unit))
    assert before > 0.9 and abs(cosines) < 0.05


def test_equal_embeddings_and_a_single_one_stay_as_they_are():
    one = unit_float16(np.random.default_rng(0).normal(size=(1, 16)))
    for equal in (one, np.repeat(one, 1_001, axis=0)):
        assert np.array_equal(centred(equal, sum_of(equal) / len(equal)), equal)


def unit_float16(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
