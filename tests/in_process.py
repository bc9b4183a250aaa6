"""Run without Ray in a process whose tests have one: no worker has to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from elfs_ray.config import Config
from elfs_ray.pipeline import runner
from elfs_ray.storage.run_dir import RunDir


@contextmanager
def without_ray(monkeypatch, folder: Path | str) -> Iterator[None]:
    """Let this process be on a machine without a cluster; `folder` is one where Ray has never noted any."""
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setenv("RAY_TMPDIR", str(folder))  # where Ray would note a cluster that was started by hand
        yield


def run_here(monkeypatch, config: Config) -> RunDir:
    """Run the pipeline in this process."""
    with without_ray(monkeypatch, config.run_dir):
        return runner.run(replace(config, ray_address=None))
