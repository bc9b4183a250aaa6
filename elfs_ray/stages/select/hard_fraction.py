"""Choose the hard fraction β of each budget: a number from the config, an estimate, or the result of a search.

select.hard_fraction=auto estimates β from the training dynamics, in two passes over scores/
(methods/selection/hard_fraction.py). `search` tries values of β by short trainings (hard_fraction_search.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elfs_ray.config import Config
from elfs_ray.methods.selection.hard_fraction import (
    MIN_SAMPLES_PER_CLASS,
    count_difficulty,
    estimate_risks,
    least_risk,
)
from elfs_ray.methods.selection.pruning import budget_count
from elfs_ray.runtime.progress import say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select.hard_fraction_search import search_hard_fractions
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.selection import Budget
from elfs_ray.storage.run_dir import RunDir

PROBABILITY = "dual_mean_prob"
SHOWN_EVERY = 5  # of the risks, which are estimated at every 0.01: the report shows every 0.05


class Choice(NamedTuple):
    """A budget with its hard fraction, and the metrics that it was chosen by; None for a number from the config."""

    budget: Budget
    evidence: Mapping[str, Any] | None


def choose_hard_fractions(config: Config, run_dir: RunDir, pool: ScoredPool) -> list[Choice]:
    """Return the number of samples and the hard fraction of each budget, in the order of config.budgets.

    Raises ValueError for budgets that do not fit the pool.
    """
    settings = config.hard_fractions
    counts = [budget_count(budget, pool.num_samples) for budget in config.budgets]
    results: dict[tuple[str, int], tuple[float, Mapping[str, Any]]] = {}
    for word, find in (("auto", estimate_hard_fractions), ("search", search_hard_fractions)):
        # Two budgets may give the same number of samples, such as 0.1 and 100 of 1,000: each number is tried once.
        open_counts = list(dict.fromkeys(count for count, each in zip(counts, settings, strict=True) if each == word))
        if open_counts:
            keys = [(word, count) for count in open_counts]
            results |= zip(keys, find(config, run_dir, pool, open_counts), strict=True)
    choices = []
    for count, setting in zip(counts, settings, strict=True):
        if isinstance(setting, str):
            hard_fraction, evidence = results[setting, count]
            choices.append(Choice(Budget(count, hard_fraction), {"found_by": setting, **evidence}))
        else:
            choices.append(Choice(Budget(count, float(setting)), None))
    return choices


def estimate_hard_fractions(
    config: Config, run_dir: RunDir, pool: ScoredPool, counts: Sequence[int]
) -> list[tuple[float, dict[str, Any]]]:
    """Return, for each number of samples to keep, the hard fraction of least risk and the "risks" at every 0.05."""
    ranges = list(pool.map_shares(_score_range))
    score_range = min(low for low, _ in ranges), max(high for _, high in ranges)
    sums = sum(pool.map_shares(_count_difficulty, score_range))
    num_classes = ClusterResult.read(run_dir).num_clusters
    results = []
    for count in counts:
        if count < MIN_SAMPLES_PER_CLASS * num_classes:
            say(
                f"select    {count:,} images are {count / num_classes:.1f} a cluster: auto needs about "
                f"{MIN_SAMPLES_PER_CLASS}; with fewer, set select.hard_fraction to a number or to search"
            )
        risks = estimate_risks(sums, count, num_classes)
        best = least_risk(risks)
        shown = [risk._asdict() | {"risk": risk.risk} for risk in risks[::SHOWN_EVERY]]
        results.append((best, {"risks": shown}))
    return results


def _score_range(pool: ScoredPool, files: Sequence[str]) -> tuple[float, float]:
    scores = [pool.read(path).scores for path in files]
    # All images of a file may be gone or excluded.
    lowest = min(float(column.min(initial=np.inf)) for column in scores)
    return lowest, max(float(column.max(initial=-np.inf)) for column in scores)


def _count_difficulty(pool: ScoredPool, files: Sequence[str], score_range: tuple[float, float]) -> np.ndarray:
    sums: np.ndarray | int = 0
    for path in files:
        rows = pool.read(path)
        probs = rows.column(PROBABILITY)
        sums += count_difficulty(rows.scores, rows.groups, probs, score_range, pool.direction, pool.num_groups)
    return np.asarray(sums)
