"""Run the pipeline without Ray in a process whose tests have one: no worker has to start."""

from dataclasses import replace

import ray

from elfs_ray.config import Config
from elfs_ray.pipeline import runner
from elfs_ray.storage.run_dir import RunDir


def run_here(monkeypatch, config: Config) -> RunDir:
    """Run the pipeline in this process, as on a machine without a cluster."""
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setenv("RAY_TMPDIR", config.run_dir)  # where Ray would note a cluster that was started by hand
        return runner.run(replace(config, ray_address=None))
