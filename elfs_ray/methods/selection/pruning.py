"""Decide which samples of a scored pool to keep: how many, from which rank on, and the keys that order them.

A selection is a window of ranks in each group (the pool, a pseudo-class, a stratum), over samples ordered by an integer
key, ties by sample_id. Keys come from hardness (`quantiles.hardness_keys`) or from a method below. Random choices are
hashes of (seed, sample_id), so they do not depend on the order of the samples or on which worker holds them.
`quantiles.rank_to_cut` finds the window over any number of shards.
"""

import math
from fractions import Fraction

import numpy as np

from elfs_ray.methods.numeric.hashing import hash_uint64, hash_uniform
from elfs_ray.methods.selection.quantiles import Direction, hard_first_order, hardness_keys

DUAL_CONCENTRATION = 15.0
DUAL_NUM_ANCHORS = 10

# Each method has its own stream of random numbers, so that two methods with the same seed choose independently.
_RANDOM_STREAM, _STRATIFIED_STREAM, _DUAL_STREAM = 1, 2, 3
_HASH_BITS_IN_STRATUM = 26  # of a 32-bit key; the other six hold the stratum


def budget_count(budget: float | np.floating | np.integer, num_samples: int) -> int:
    """Turn a budget into the number of samples to keep.

    budget: an integer is a count, 1 <= count <= num_samples; a float is the fraction to keep, 0 < fraction <= 1. So 1
    is one sample and 1.0 is the whole pool. A fraction keeps ⌊fraction · num_samples⌋ samples, where a product that
    misses an integer only by binary rounding counts as that integer: 0.29 of 100 is 29, 1/3 of 300 is 100.
    Raises ValueError for budgets outside these ranges and for a fraction that keeps no sample.
    """
    problem = f"budget is {budget!r} for a pool of {num_samples} samples"
    # bool is a subclass of int: without this test True would keep one sample.
    if isinstance(budget, bool | np.bool_) or not isinstance(budget, int | float | np.integer | np.floating):
        raise ValueError(f"{problem}; give an integer count or a fraction in (0, 1]")
    if isinstance(budget, int | np.integer):
        if not 1 <= budget <= num_samples:
            raise ValueError(f"{problem}; a count must lie between 1 and the size of the pool")
        return int(budget)
    if not 0 < budget <= 1:
        raise ValueError(
            f"{problem}; a fraction must lie in (0, 1]; write a count as an integer, without a decimal point"
        )
    count = floor_of_fraction(float(budget), num_samples)
    if count == 0:
        raise ValueError(f"{problem}, which rounds down to no sample; keep at least a fraction of 1/{num_samples}")
    return count


def floor_of_fraction(fraction: float, num_samples: int) -> int:
    """Return ⌊fraction · num_samples⌋ for 0 <= fraction <= 1, forgiving a rounding error of 2**-50 in the fraction."""
    # In floats 0.29 · 100 is 28.999…, whose floor is one too low. Fractions are exact, and 2**-50 is a few ulps of the
    # fraction (1 - 0.71 has lost more than one), far too little to reach the next integer of a real pool.
    return math.floor((Fraction(fraction) + Fraction(1, 2**50)) * num_samples)


def window_start(num_samples: int, budget_count: int, hard_fraction: float) -> int:
    """Return how many of the hardest samples double-end pruning drops: ⌊hard_fraction · num_samples⌋.

    hard_fraction: β as a fraction of the whole pool, 0 <= β <= p = 1 - budget_count / num_samples. At β = p the window
    ends at the easiest sample. Where β and the budget are both rounded down, one easy sample may be left behind it, as
    in the formula (1,003 samples, β = 0.9, budget 0.1: 902 dropped, 100 kept, 1 left). A β above p by no more than
    binary rounding counts as p, so that the window always has its full budget. Raises ValueError for β outside [0, p].
    """
    pruned = num_samples - budget_count
    if not 0 <= hard_fraction <= pruned / num_samples + 2**-50:
        raise ValueError(
            f"hard_fraction is {hard_fraction!r}, but keeping {budget_count} of {num_samples} samples prunes "
            f"a fraction of {pruned / num_samples:.6g}; hard_fraction, also a fraction of the whole pool, must "
            "lie between 0 and that"
        )
    start = floor_of_fraction(float(hard_fraction), num_samples)
    assert start <= pruned
    return start


def random_selection(sample_ids: np.ndarray, budget_count: int, seed: int) -> np.ndarray:
    """Select a uniform random subset: the positions (budget_count,) int64 of the first samples by `random_keys`.

    With one seed, a smaller budget is a prefix of a larger one. Raises ValueError for duplicate ids and budgets
    outside [1, n]. Memory: about 40 bytes per sample.
    """
    _check_pool(sample_ids, budget_count)
    return hard_first_order(random_keys(sample_ids, seed), sample_ids)[:budget_count]


def random_keys(sample_ids: np.ndarray, seed: int) -> np.ndarray:
    """Return keys (n,) uint32 whose ascending order is a uniform random permutation; see `random_selection`."""
    return (hash_uint64(seed, _RANDOM_STREAM, sample_ids) >> np.uint64(32)).astype(np.uint32)


def strata_of(
    scores: np.ndarray,
    lowest: float | np.ndarray,
    highest: float | np.ndarray,
    direction: Direction,
    num_strata: int,
) -> np.ndarray:
    """Return the stratum of each score, (n,) int64, 0 the hardest; all have the width (highest - lowest) / num_strata.

    lowest and highest are numbers, or (n,) where classes differ. Scores outside them get the nearest stratum.
    """
    if not 1 <= num_strata <= 1 << (32 - _HASH_BITS_IN_STRATUM):
        raise ValueError(f"num_strata is {num_strata}; it must lie between 1 and {1 << (32 - _HASH_BITS_IN_STRATUM)}")
    width = np.asarray(highest, np.float64) - lowest
    # Where all scores are equal the width is 0, and the last line puts them into one stratum.
    from_low = (scores.astype(np.float64) - lowest) / np.where(width > 0, width, 1) * num_strata
    strata = np.clip(from_low.astype(np.int64), 0, num_strata - 1)
    return np.where(width > 0, num_strata - 1 - strata if direction == "high" else strata, 0)


def stratified_keys(strata: np.ndarray, sample_ids: np.ndarray, seed: int) -> np.ndarray:
    """Return keys (n,) uint32 that sort by stratum, and at random within a stratum.

    With sizes c and allocations m, stratum s keeps the m_s ranks from c_0 + … + c_(s-1) on.
    """
    hashes = hash_uint64(seed, _STRATIFIED_STREAM, sample_ids)
    low_bits = (hashes >> np.uint64(64 - _HASH_BITS_IN_STRATUM)).astype(np.uint32)
    return (strata.astype(np.uint32) << np.uint32(_HASH_BITS_IN_STRATUM)) | low_bits


def allocate_evenly(counts: np.ndarray, budget_count: int) -> np.ndarray:
    """Divide a budget evenly over groups of limited size (CCS, arXiv 2210.15809, algorithm 1).

    The smallest group goes first and gets its share of the remaining budget, ⌊budget / remaining groups⌋, or all its
    samples if they are fewer; the rest passes on to the others. Among groups of equal size the first goes first.
    counts: (k,) int64. Returns (k,) int64 whose sum is budget_count. Raises ValueError where the groups hold less than
    the budget.
    """
    if budget_count > counts.sum():
        raise ValueError(f"a budget of {budget_count} cannot be met from groups that hold {counts.sum()} samples")
    allocation = np.zeros(counts.size, np.int64)
    left = budget_count
    for served, group in enumerate(np.argsort(counts, kind="stable")):
        allocation[group] = min(int(counts[group]), left // (counts.size - served))
        left -= int(allocation[group])
    assert left == 0
    return allocation


def dual_beta_keys(
    dual: np.ndarray,
    mean_prob: np.ndarray,
    sample_ids: np.ndarray,
    anchor_mean: float | np.ndarray,
    pruning_rate: float | np.ndarray,
    seed: int,
    exponent: float,
) -> np.ndarray:
    """Return keys (n,) uint32 whose first m, ascending, are m samples without replacement by the weights of DUAL.

    The weight is dual · Beta(mean_prob; a, b) with b = 15 (1 - anchor_mean)(1 - pruning_rate**exponent), a = 16 - b, as
    in the authors' code (arXiv 2502.06905): the higher the pruning rate, the more it leans towards easy samples.
    anchor_mean is the mean of mean_prob over the ten highest scores; it and pruning_rate are (n,) where classes differ.
    Samples of weight 0 come last. Raises ValueError for values outside their ranges.
    """
    for name, value in (("anchor_mean", anchor_mean), ("pruning_rate", pruning_rate)):
        if not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
            raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
    if (dual < 0).any() or not ((mean_prob >= 0) & (mean_prob <= 1)).all():
        raise ValueError(
            "DUAL scores must not be negative, and mean_prob must hold probabilities: pass the columns dual and "
            "dual_mean_prob of the scores"
        )
    b = DUAL_CONCENTRATION * (1 - anchor_mean) * (1 - pruning_rate**exponent)
    a = DUAL_CONCENTRATION + 1 - b
    prob = np.clip(mean_prob.astype(np.float64), 2.0**-24, 1 - 2.0**-24)  # log 0 would be infinite
    log_weight = (a - 1) * np.log(prob) + (b - 1) * np.log1p(-prob)
    positive = dual > 0
    log_weight[positive] += np.log(dual[positive].astype(np.float64))
    log_weight[~positive] = -1000.0  # below any other: log weights stay above -400
    # The Gumbel-top-k trick: the largest values of log weight + Gumbel noise are distributed as samples taken one after
    # another without replacement, and every sample's value can be computed on its own.
    uniform = hash_uniform(seed, _DUAL_STREAM, sample_ids) + 2.0**-54  # half a step, so that it is never 0
    gumbel = -np.log(-np.log(uniform))
    return hardness_keys((log_weight + gumbel).astype(np.float32), "high")


def balanced_windows(counts: np.ndarray, budget_count: int, hard_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return double-end windows of pseudo-classes: how many hardest samples each drops and how many it then keeps.

    The budget is divided evenly, as far as classes have samples (`allocate_evenly`). The hard fraction is one of each
    class, not of the pool: of c samples the ⌊βc⌋ hardest are dropped, or fewer where the class's share of the budget
    needs them. counts: (k,) int64, 0 for a class without samples. Returns two (k,) int64.
    Raises ValueError as `window_start` of the pool does.
    """
    window_start(int(counts.sum()), budget_count, hard_fraction)
    shares = allocate_evenly(counts, budget_count)
    dropped = np.array([floor_of_fraction(float(hard_fraction), int(count)) for count in counts], np.int64)
    return np.minimum(dropped, counts - shares), shares


def _check_pool(sample_ids: np.ndarray, budget_count: int) -> None:
    if not 1 <= budget_count <= sample_ids.size:
        raise ValueError(
            f"budget is {budget_count} samples of a pool of {sample_ids.size}; it must be 1 to the whole pool"
        )
    in_order = np.sort(sample_ids)
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if twice.size:
        raise ValueError(f"sample ids {np.unique(twice)[:5].tolist()} occur more than once; every id must be unique")
