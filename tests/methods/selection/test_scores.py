import math
import statistics
from itertools import pairwise

import numpy as np
import pytest

from elfs_ray.methods.selection.scores import SCORES, ScoreAccumulator


def compute_scores(target_prob, max_other_prob, el2n, sample_ids=None):
    """Return the scores of a whole table, (epochs, n) each."""
    accumulator = ScoreAccumulator(range(target_prob.shape[1]) if sample_ids is None else sample_ids)
    for columns in zip(target_prob, max_other_prob, el2n, strict=True):
        accumulator.add_epoch(accumulator.sample_ids, *columns)
    return accumulator.finish()


def sequence(target_prob, max_other_prob=None, el2n=None):
    """Return the scores of a single sample from plain lists, one value per epoch."""
    columns = [
        target_prob,
        [0.5] * len(target_prob) if max_other_prob is None else max_other_prob,
        [0.0] * len(target_prob) if el2n is None else el2n,
    ]
    scores = compute_scores(*(np.array(column, np.float32)[:, None] for column in columns))
    return {name: column[0] for name, column in scores.items()}


def random_table(num_epochs, n, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(5, 0.4), (num_epochs, n))
    target, others = probs[..., 0], probs[..., 1:]
    el2n = np.sqrt((1 - target) ** 2 + (others**2).sum(axis=-1))
    return tuple(column.astype(np.float32) for column in (target, others.max(axis=-1), el2n))


def plain_scores(target, other, el2n):
    """Return every score of one sample, from its formula, in Python."""
    right = [p > q for p, q in zip(target, other, strict=True)]
    early = target[:30]
    windows = [early[i : i + 10] for i in range(max(1, len(early) - 9))]
    duals = [10 * statistics.stdev(w) * (1 - statistics.fmean(w)) if len(w) > 1 else 0.0 for w in windows]
    last = [target[-1], other[-1], max(0.0, 1 - target[-1] - other[-1])]
    return {
        "aum": math.fsum(p - q for p, q in zip(target, other, strict=True)),
        "forgetting": sum(a and not b for a, b in pairwise(right)) if any(right) else len(right),
        "never_learned": not any(right),
        "el2n": math.fsum(el2n[:10]),
        "correctness": sum(right),
        "coarse_entropy": -sum(p * math.log(p) for p in last if p > 0),
        "dual": statistics.fmean(duals),
        "dual_mean_prob": statistics.fmean(early),
    }


@pytest.mark.parametrize("num_epochs", [1, 2, 9, 10, 11, 29, 30, 31, 60])
def test_every_score_equals_its_formula_for_runs_of_any_length(num_epochs):
    tables = random_table(num_epochs, 40, seed=num_epochs)
    scores = compute_scores(*tables)
    for sample in range(40):
        expected = plain_scores(*(table[:, sample].tolist() for table in tables))
        assert scores.keys() == expected.keys()
        for name, value in expected.items():
            assert scores[name][sample] == pytest.approx(value, rel=2e-6, abs=2e-6), name


def test_scores_have_the_dtypes_of_the_table_and_a_direction_each():
    scores = compute_scores(*random_table(3, 4))
    assert {name: column.dtype.name for name, column in scores.items()} == {
        "aum": "float32",
        "forgetting": "int32",
        "never_learned": "bool",
        "el2n": "float32",
        "correctness": "int32",
        "coarse_entropy": "float32",
        "dual": "float32",
        "dual_mean_prob": "float32",
    }
    assert scores.keys() - SCORES.keys() == {"never_learned", "dual_mean_prob"}


def test_a_mislabelled_sample_is_harder_than_a_clean_one_by_every_score():
    clean = sequence([0.5, 0.9, 0.96, 0.97, 0.99], [0.3, 0.05, 0.02, 0.01, 0.01], [0.6, 0.1, 0.05, 0.03, 0.01])
    noisy = sequence([0.1, 0.3, 0.05, 0.3, 0.2], [0.5, 0.2, 0.9, 0.6, 0.5], [1.1, 0.8, 1.3, 0.9, 1.0])
    for name, direction in SCORES.items():
        assert noisy[name] < clean[name] if direction == "low" else noisy[name] > clean[name], name


def test_forgetting_counts_falls_from_right_to_wrong():
    assert sequence([0.6, 0.4, 0.6, 0.4, 0.6])["forgetting"] == 2
    assert sequence([0.6, 0.6, 0.6])["forgetting"] == 0
    assert sequence([0.4, 0.4, 0.6])["forgetting"] == 0  # learned late, never forgotten
    assert sequence([0.6, 0.4, 0.4])["forgetting"] == 1


def test_never_learned_is_the_hardest_by_forgetting():
    never = sequence([0.4, 0.4, 0.4, 0.4])
    assert never["never_learned"] and never["forgetting"] == 4
    assert never["forgetting"] > sequence([0.6, 0.4, 0.6, 0.4])["forgetting"] == 2
    assert sequence([0.4])["forgetting"] == 1 and sequence([0.6])["forgetting"] == 0


def test_a_tie_between_the_two_probabilities_is_a_wrong_prediction():
    tied = sequence([0.5, 0.5])
    assert tied["never_learned"] and tied["correctness"] == 0


def test_el2n_sums_the_first_ten_epochs():
    assert sequence([0.5] * 12, el2n=[0.25] * 10 + [9.0, 9.0])["el2n"] == 2.5
    assert sequence([0.5] * 3, el2n=[0.25, 0.5, 1.0])["el2n"] == 1.75


def test_dual_of_a_single_window_worked_by_hand():
    # Five epochs at 0.2 and five at 0.6: mean 0.4, sum of squares 10 · 0.04, variance 0.4 / 9.
    assert sequence([0.2, 0.6] * 5)["dual"] == pytest.approx(10 * math.sqrt(0.4 / 9) * 0.6, rel=1e-6)


def test_dual_averages_sliding_windows_of_the_first_thirty_epochs():
    # 29 epochs at 0, then 1: only the last of the 21 windows varies: mean 0.1, variance (0.9² + 9 · 0.1²) / 9 = 0.1.
    assert sequence([0.0] * 29 + [1.0] * 20)["dual"] == pytest.approx(10 * math.sqrt(0.1) * 0.9 / 21, rel=1e-6)
    assert sequence([0.0] * 30 + [1.0] * 20)["dual"] == 0


def test_dual_of_short_runs_is_one_window_and_zero_for_a_single_epoch():
    assert sequence([0.2, 0.6])["dual"] == pytest.approx(10 * math.sqrt(0.08) * 0.6, rel=1e-6)
    assert sequence([0.7])["dual"] == 0


def test_coarse_entropy_is_that_of_the_last_epoch_and_a_lower_bound():
    assert sequence([0.9, 0.5], [0.1, 0.5])["coarse_entropy"] == pytest.approx(math.log(2))
    assert sequence([0.1, 1.0], [0.5, 0.0])["coarse_entropy"] == 0
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(10), 200)
    true = -(probs * np.log(probs)).sum(axis=1)
    rest = 1 - probs[:, 0] - probs[:, 1:].max(axis=1)
    columns = [column[None].astype(np.float32) for column in (probs[:, 0], probs[:, 1:].max(axis=1), rest)]
    coarse = compute_scores(*columns)["coarse_entropy"]
    assert (coarse <= true + 1e-6).all()
    assert (coarse + rest * math.log(8) >= true - 1e-6).all()


def test_shares_of_shuffled_records_score_as_the_whole_table():
    tables = random_table(33, 500)
    ids = np.flatnonzero(np.random.default_rng(1).random(700) < 0.9)[:500].astype(np.int64)  # gaps: rejected samples
    whole = compute_scores(*tables, sample_ids=ids)
    rng = np.random.default_rng(2)
    for begin, end in ((0, 1), (1, 240), (240, 500)):
        accumulator = ScoreAccumulator(ids[begin:end])
        for epoch in range(33):
            at = begin + rng.permutation(end - begin)
            accumulator.add_epoch(ids[at], *(table[epoch, at] for table in tables))
        for name, column in accumulator.finish().items():
            np.testing.assert_array_equal(column, whole[name][begin:end])


def test_samples_beyond_one_internal_block_are_scored_alike():
    target, other, el2n = random_table(12, 7)
    repeats = 10_000
    scores = compute_scores(*(np.tile(table, repeats) for table in (target, other, el2n)))
    for name, column in compute_scores(target, other, el2n).items():
        np.testing.assert_array_equal(scores[name], np.tile(column, repeats))


def test_margins_too_small_for_float32_add_up():
    just_below_half = float(np.nextafter(np.float32(0.5), np.float32(0)))  # by 2**-25
    aum = sequence([1.0] + [0.5] * 4096, [0.0] + [just_below_half] * 4096)["aum"]
    assert aum == np.float32(1 + 4096 * 2.0**-25)


def test_a_probability_above_one_by_rounding_counts_as_one():
    assert sequence([1 + 1e-6] * 3, [0.0] * 3)["aum"] == 3
    assert sequence([1 + 1e-6] * 3, [0.0] * 3)["dual"] == 0


def test_values_that_are_not_finite_are_refused_and_nothing_is_added():
    ids, column = np.array([3, 4, 7]), np.full(3, 0.5, np.float32)
    accumulator, once = ScoreAccumulator(ids), ScoreAccumulator(ids)
    for each in (accumulator, once):
        each.add_epoch(ids, column, column, column)
    for bad in (np.nan, np.inf):
        diverged = np.array([0.1, bad, 0.3], np.float32)
        with pytest.raises(ValueError, match=r"epoch 1: target_prob is NaN or infinite for 1 of 3 .* lower train\.lr"):
            accumulator.add_epoch(ids, diverged, column, column)
        with pytest.raises(ValueError, match=r"epoch 1: el2n is NaN or infinite for 1 of 3 .* lower train\.lr"):
            accumulator.add_epoch(ids, column, column, diverged)
    untouched, expected = accumulator.finish(), once.finish()
    for name in expected:
        np.testing.assert_array_equal(untouched[name], expected[name])


def test_records_of_other_samples_are_never_scored():
    column = np.full(3, 0.5, np.float32)
    for other in ([3, 4, 8], [3, 4, 4]):
        with pytest.raises(AssertionError, match="other samples"):
            ScoreAccumulator(np.array([3, 4, 7])).add_epoch(np.array(other), column, column, column)
