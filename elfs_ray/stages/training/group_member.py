"""A worker's place in its group, and the sums that all workers of the group take part in."""

from dataclasses import dataclass

import ray.train
import ray.train.torch
import torch
from torch import distributed


@dataclass(frozen=True)
class GroupMember:
    """One worker of a group; `device` is where it computes and exchanges tensors with the others."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls) -> "GroupMember":
        """Return the place of the Ray Train worker that calls."""
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    @property
    def process_group(self) -> distributed.ProcessGroup | None:
        """Return the group that exchanges tensors, or None for a worker that is alone."""
        return distributed.group.WORLD if self.world_size > 1 else None

    def sum_over_workers(self, *values: float) -> list[float]:
        """Add up each value over all workers, in float64; every worker must call it, with as many values."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(sums)
        return sums.tolist()
