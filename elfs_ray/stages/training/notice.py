"""Notice in time that a machine of a worker group is about to be taken away, as a cloud does with spot machines.

A cloud warns half a minute to two minutes before. Ray Train passes the warning on to the workers; these save what they
have, also within an epoch, and leave at once (`LeftOnNotice`). The group then starts again on other machines, or when
there are some (ray_train.py), and loses no step.
"""

import time

from elfs_ray.stages.training.group_member import GroupMember

# Asking is a round trip between the workers and an actor of Ray Train's: some milliseconds, far longer than a step of a
# small network.
INTERVAL_S = 2.0


class LeftOnNotice(Exception):
    """Raised in every worker of a group that has saved its state because a machine is about to be taken away."""


class Notice:
    """Asks Ray Train for a notice about every two seconds, after a number of steps on which all workers agree."""

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._interval = self._steps_left = 1
        self._asked_s = time.monotonic()

    def is_here(self) -> bool:
        """Return True if a machine of the group is about to be taken away; all workers must ask after each step."""
        self._steps_left -= 1
        if self._steps_left or not self._member.is_in_ray_train:
            return False
        import ray.train

        if ray.train.get_preemption_info() is not None:
            self._steps_left = 1  # a caller that cannot leave now asks again after its next step
            return True
        passed_s = max(time.monotonic() - self._asked_s, 1e-3)
        # At most twice as many as before: a single quick step says little about the next ones.
        steps = min(2 * self._interval, max(1, int(self._interval * INTERVAL_S / passed_s)))
        # Clocks differ between workers, and a question that not all of them ask never ends: rank 0 decides for all.
        self._interval = self._steps_left = int(self._member.from_rank_0(steps))
        self._asked_s = time.monotonic()
        return False
