"""The hard fraction from the records of training, in two passes over scores/ (methods/selection/hard_fraction.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from elfs_ray.config import Config
from elfs_ray.methods.selection.hard_fraction import count_difficulty, estimate_risks, least_risk
from elfs_ray.runtime.progress import say
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage.run_dir import RunDir

PROBABILITY = "dual_mean_prob"
SHOWN_EVERY = 5
MIN_SAMPLES_PER_CLASS = 10  # measured, BENCHMARKS.md


def estimate_hard_fractions(
    config: Config, run_dir: RunDir, pool: ScoredPool, counts: Sequence[int]
) -> list[tuple[float, dict[str, Any]]]:
    """For each number of samples to keep, the hard fraction of least risk, and the "risks" of every twentieth."""
    ranges = list(pool.map_shares(_score_range))
    score_range = min(low for low, _ in ranges), max(high for _, high in ranges)
    sums = sum(pool.map_shares(_count_difficulty, score_range))
    num_classes = int(run_dir.figures("cluster")["num_clusters"])
    found = []
    for count in counts:
        if count < MIN_SAMPLES_PER_CLASS * num_classes:
            say(
                f"select    {count:,} images are {count / num_classes:.1f} a cluster: auto is good from some "
                f"{MIN_SAMPLES_PER_CLASS} on, below that give a number as select.hard_fraction, or search"
            )
        risks = estimate_risks(sums, count, num_classes)
        best = least_risk(risks)
        shown = [own._asdict() | {"risk": own.risk} for own in risks[::SHOWN_EVERY]]
        found.append((best, {"risks": shown}))
    return found


def _score_range(pool: ScoredPool, files: Sequence[str]) -> tuple[float, float]:
    scores = [pool.read(path).scores for path in files]
    return min(float(own.min()) for own in scores), max(float(own.max()) for own in scores)


def _count_difficulty(pool: ScoredPool, files: Sequence[str], score_range: tuple[float, float]) -> np.ndarray:
    sums: np.ndarray | int = 0
    for path in files:
        rows = pool.read(path)
        probs = rows.column(PROBABILITY)
        sums += count_difficulty(rows.scores, rows.groups, probs, score_range, pool.direction, pool.num_groups)
    return np.asarray(sums)
