"""Selections by sorting a pool in memory: the reference for the selections over files.

Each returns positions in its input arrays, hardest first.
"""

import numpy as np

from elfs_ray.methods.selection.pruning import (
    DUAL_NUM_ANCHORS,
    allocate_evenly,
    balanced_windows,
    dual_beta_keys,
    strata_of,
    stratified_keys,
    window_start,
)
from elfs_ray.methods.selection.quantiles import Direction, hard_first_order, hardness_keys


def hard_first(scores: np.ndarray, sample_ids: np.ndarray, direction: Direction) -> np.ndarray:
    return hard_first_order(hardness_keys(scores, direction), sample_ids)


def hardest(scores: np.ndarray, sample_ids: np.ndarray, budget_count: int, direction: Direction) -> np.ndarray:
    return hard_first(scores, sample_ids, direction)[:budget_count]


def easiest(scores: np.ndarray, sample_ids: np.ndarray, budget_count: int, direction: Direction) -> np.ndarray:
    return hard_first(scores, sample_ids, direction)[scores.size - budget_count :]


def double_end(
    scores: np.ndarray, sample_ids: np.ndarray, budget_count: int, hard_fraction: float, direction: Direction
) -> np.ndarray:
    """Select as ELFS does (2406.04273): drop the hardest ⌊βN⌋ samples and take the next ones up to the budget."""
    start = window_start(scores.size, budget_count, hard_fraction)
    return hard_first(scores, sample_ids, direction)[start : start + budget_count]


def balanced_double_end(
    scores: np.ndarray,
    sample_ids: np.ndarray,
    pseudo_labels: np.ndarray,
    budget_count: int,
    hard_fraction: float,
    direction: Direction,
) -> np.ndarray:
    """Select by double-end pruning within each pseudo-class."""
    order = hard_first(scores, sample_ids, direction)
    windows = balanced_windows(np.bincount(pseudo_labels), budget_count, hard_fraction)
    kept = np.zeros(scores.size, bool)
    for label, (start, share) in enumerate(zip(*windows, strict=True)):
        kept[order[pseudo_labels[order] == label][start : start + share]] = True
    return order[kept[order]]


def stratified(
    scores: np.ndarray,
    sample_ids: np.ndarray,
    budget_count: int,
    hard_fraction: float,
    direction: Direction,
    seed: int,
    num_strata: int = 50,
) -> np.ndarray:
    """Select as CCS does (2210.15809, algorithm 1).

    Drop the hardest ⌊βN⌋ samples, divide the others into strata of equal score range and sample in each at random.
    """
    order = hard_first(scores, sample_ids, direction)
    left = order[window_start(order.size, budget_count, hard_fraction) :]
    strata = strata_of(scores[left], float(scores[left].min()), float(scores[left].max()), direction, num_strata)
    shuffled = left[hard_first_order(stratified_keys(strata, sample_ids[left], seed), sample_ids[left])]
    counts = np.bincount(strata, minlength=num_strata)
    shares = allocate_evenly(counts, budget_count)
    kept = np.zeros(scores.size, bool)
    # np.split gives an empty part after the last stratum.
    for stratum, share in zip(np.split(shuffled, np.cumsum(counts)), shares, strict=False):
        kept[stratum[:share]] = True
    return order[kept[order]]


def dual_beta(
    dual: np.ndarray,
    mean_prob: np.ndarray,
    sample_ids: np.ndarray,
    budget_count: int,
    seed: int,
    exponent: float = 4.0,
) -> np.ndarray:
    """Select as DUAL does (2502.06905): sample by Beta weights around the mean probability of the ten top scores."""
    order = hard_first(dual, sample_ids, "high")
    anchor = float(mean_prob[order[:DUAL_NUM_ANCHORS]].mean(dtype=np.float64))
    keys = dual_beta_keys(dual, mean_prob, sample_ids, anchor, 1 - budget_count / order.size, seed, exponent)
    kept = np.zeros(order.size, bool)
    kept[hard_first_order(keys, sample_ids)[:budget_count]] = True
    return order[kept[order]]
