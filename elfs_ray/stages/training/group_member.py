"""Know a worker's place in its group, and exchange numbers with the group."""

from dataclasses import dataclass

import ray
import torch
from torch import distributed


@dataclass(frozen=True)
class GroupMember:
    """One worker of a group; `device` is where it computes and where tensors for the other workers lie.

    is_in_ray_train: False for a group of one without Ray.
    """

    rank: int
    world_size: int
    device: torch.device
    is_in_ray_train: bool = True

    @classmethod
    def current(cls) -> "GroupMember":
        """Return the place of the calling Ray Train worker; without Ray, this process is a group of one."""
        if not ray.is_initialized():
            return cls(0, 1, torch.device("cpu"), is_in_ray_train=False)
        # Late: the import takes two seconds, and a run without Ray has no use for it.
        from ray import train
        from ray.train.torch import get_device

        context = train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), get_device())

    @property
    def process_group(self) -> distributed.ProcessGroup | None:
        """Return the process group that exchanges tensors; None if there is only one worker."""
        return distributed.group.WORLD if self.world_size > 1 else None

    def from_rank_0(self, value: float) -> float:
        """Return rank 0's value on every worker; every worker must call this."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return shared.item()

    def sum_over_workers(self, *values: float) -> list[float]:
        """Return the sum of each value over all workers; every worker must call this with as many values."""
        # float64, in which counts of samples stay exact.
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(sums)
        return sums.tolist()
