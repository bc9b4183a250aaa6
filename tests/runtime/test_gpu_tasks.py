"""Tasks on a GPU: the worker of one takes the next, where the next has the same GPU. Ray only counts the GPUs here."""

import subprocess
import sys
from pathlib import Path

import pytest

NUM_TASKS = 6
SCRIPT = """
import os
import sys

from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import run_tasks


def worker(_):
    return os.getpid()


connect("local", num_cpus=2, num_gpus=int(sys.argv[1]))
tasks = [(number,) for number in range(int(sys.argv[2]))]
print(len({pid for _, pid in run_tasks(worker, tasks, num_gpus_each=1)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "num_workers"), [(1, range(1, NUM_TASKS)), (2, [NUM_TASKS])])
def test_a_worker_takes_further_tasks_on_a_nodes_only_gpu(num_gpus, num_workers):
    command = [sys.executable, "-c", SCRIPT, str(num_gpus), str(NUM_TASKS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) in num_workers
