"""How often workers ask for the notice that a machine is about to be taken away."""

from types import SimpleNamespace

import pytest
import ray.train
import torch

from elfs_ray.stages.training import notice
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.notice import INTERVAL_S, Notice


@pytest.mark.parametrize("step_s", [0.001, 0.3, 10.0])
def test_workers_ask_about_every_two_seconds_or_after_every_step(monkeypatch, step_s):
    now_s, asked_s = 0.0, []
    monkeypatch.setattr(notice, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked_s.append(now_s))
    watch = Notice(GroupMember(0, 1, torch.device("cpu")))
    num_steps = int(60 / step_s)
    for _ in range(num_steps):
        now_s += step_s
        assert not watch.is_here()
    assert asked_s[0] == pytest.approx(step_s)
    expected = INTERVAL_S if step_s < INTERVAL_S else step_s
    assert asked_s[-1] - asked_s[-2] == pytest.approx(expected, rel=0.2)


def test_a_notice_is_told_until_the_workers_can_leave(monkeypatch):
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: "a node is about to be taken away")
    watch = Notice(GroupMember(0, 1, torch.device("cpu")))
    assert [watch.is_here() for _ in range(3)] == [True, True, True]
