"""Estimate the hard fraction β from the proxy's training dynamics, without training again.

A coreset represents the pool, and can fail as any small sample does:

    bias      the window's samples are harder or easier than the pool's, so what they teach does not hold for the rest;
    variance  the window has few samples per class, and some are no good examples of it.

Let q be the mean probability that the proxy gave a sample's pseudo-label over its first 30 epochs, before a network
memorizes wrong labels. It measures how good an example of its cluster the sample is. It needs no true label, and falls
from the easy end to the hard end as the share of correct pseudo-labels does. For a window of m samples and k
pseudo-classes,

    risk(β) = (mean q of the window - mean q of the pool)² + k/m · mean q (1 - q) of the window

is the squared bias plus the variance of a class's share of good examples, estimated from the class's m/k samples. The
estimate is the β of least risk, among those whose window leaves out the easiest fifth of the pool if the budget allows.
The easiest samples are all alike, which neither term sees, and no window that the paper found by search reaches them
(they end at 0.5 to 0.8 of the pool). With many samples per class the first term decides: the window lies around
the pool's mean difficulty. With a handful per class the second term moves it to the easy end.

Everything comes from one histogram over the scores, whose integer sums are the same in any order. Memory: 24 bytes per
bin, 1.5 MiB for a single group and as much for all classes where they are balanced.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from elfs_ray.methods.selection.pruning import balanced_windows
from elfs_ray.methods.selection.quantiles import Direction

AUTO_STEP = 0.01
MIN_SAMPLES_PER_CLASS = 10  # with fewer, the estimate is poor (measured, BENCHMARKS.md)
EASY_END = Fraction(1, 5)
_MAX_BINS = 1 << 16
_MIN_BINS = 1 << 6
_UNIT = 1 << 20  # probabilities are rounded to multiples of 1 / _UNIT, so that their sums are exact


class Risk(NamedTuple):
    """The bias and variance of a hard fraction; a positive bias means a window that is easier than the pool."""

    hard_fraction: float
    bias: float
    variance: float

    @property
    def risk(self) -> float:
        return self.bias**2 + self.variance


def fraction_grid(step: float, num_kept: int, num_samples: int) -> list[float]:
    """Return the multiples of `step`, as written in decimal, from 0 to the share that is pruned."""
    exact = Fraction(str(step))  # the float 0.01 is not exactly a hundredth, and its multiples drift
    pruned = Fraction(num_samples - num_kept, num_samples)
    return [float(i * exact) for i in range(pruned // exact + 1)]


def count_difficulty(
    scores: np.ndarray,
    groups: np.ndarray,
    probs: np.ndarray,
    score_range: tuple[float, float],
    direction: Direction,
    num_groups: int,
) -> np.ndarray:
    """Sum samples, q and q (1 - q) in bins of equal width of the score: (3, groups, bins) int64, the hardest bin first.

    scores: (n,) float32 or int32; groups: (n,) integers below num_groups; probs: (n,) float32, the q; score_range: the
    pool's lowest and highest score. q is rounded to 2**-20. Results for disjoint sets of samples add up.
    """
    lowest, highest = score_range
    num_bins = max(_MIN_BINS, _MAX_BINS // num_groups)
    width = (highest - lowest) or 1.0
    bins = ((scores.astype(np.float64) - lowest) / width * num_bins).astype(np.int64).clip(0, num_bins - 1)
    if direction == "high":
        bins = num_bins - 1 - bins
    units = np.rint(probs.astype(np.float64) * _UNIT)
    cells, num_cells = groups * num_bins + bins, num_groups * num_bins
    # bincount adds its weights in float64, which is exact for whole numbers below 2**53.
    weights = (None, units, np.floor(units * (_UNIT - units) / _UNIT))
    sums = np.stack([np.bincount(cells, weight, minlength=num_cells).astype(np.int64) for weight in weights])
    return sums.reshape(3, num_groups, num_bins)


def estimate_risks(sums: np.ndarray, num_kept: int, num_classes: int) -> list[Risk]:
    """Return the risk of every multiple of 0.01 that may be chosen, from `count_difficulty` of the whole pool.

    Each group gets its window from `pruning.balanced_windows`. A bin on a window's edge counts in proportion.
    """
    samples, probs, spreads = (np.cumsum(_padded(part), axis=1) for part in sums)
    counts = samples[:, -1]
    pool_mean = probs[:, -1].sum() / counts.sum() / _UNIT
    num_samples = int(counts.sum())
    # The last β whose window leaves out the easy end; a budget too large for that starts at the hardest sample.
    latest = max(Fraction(0), 1 - EASY_END - Fraction(num_kept, num_samples))
    risks = []
    for hard_fraction in fraction_grid(AUTO_STEP, num_kept, num_samples):
        if Fraction(str(hard_fraction)) > latest:
            break
        starts, shares = balanced_windows(counts, num_kept, hard_fraction)
        # np.interp over cumulative counts gives the sum up to any rank, as if a bin's samples were alike.
        mean, spread = (
            sum(
                np.interp(start + share, ranks, total) - np.interp(start, ranks, total)
                for start, share, ranks, total in zip(starts, shares, samples, totals, strict=True)
            )
            / num_kept
            / _UNIT
            for totals in (probs, spreads)
        )
        risks.append(Risk(hard_fraction, float(mean - pool_mean), float(spread * num_classes / num_kept)))
    return risks


def least_risk(risks: Sequence[Risk]) -> float:
    """Return the hard fraction of least risk, and the smallest where risks differ by rounding alone."""
    limit = min(each.risk for each in risks) * (1 + 1e-9) + 1e-12
    return next(each.hard_fraction for each in risks if each.risk <= limit)


def _padded(sums: np.ndarray) -> np.ndarray:
    return np.pad(sums, ((0, 0), (1, 0)))
