"""Estimate stage select."""

import math

from elfs_ray.config import BY_COVERAGE
from elfs_ray.methods.selection.greedi import PARTITION_ROWS
from elfs_ray.stages.estimate import GIB, Estimate, Work

PARTITION_S = 11  # of a core, to cover 20,000 samples of 384 dimensions, the final choice included
ROW_S = 56e-9  # to reduce a sample's score to a coreset


def estimate(work: Work) -> Estimate:
    """Return what the choice takes, besides trainings that select.hard_fraction=search asks for."""
    n, cpus = work.num_samples, max(1, work.devices.num_cpus)
    if work.config.select.method not in BY_COVERAGE:
        return Estimate(ROW_S * n, GIB / 2)
    parts = math.ceil(n / PARTITION_ROWS)
    rows = min(n, PARTITION_ROWS)
    seconds = PARTITION_S * (rows / PARTITION_ROWS) ** 2 * math.ceil(parts / cpus) * max(1.0, work.dim / 384)
    matrix = 2 * rows * rows * (2 if parts > 1 else 1)
    return Estimate(seconds, matrix + 2 * rows * work.dim + GIB / 2)
