"""Decide whether a run needs Ray, and connect to it.

To start Ray and its workers takes longer than all the work on a small pool. A run does that work in threads of its own
process, trainings included, if no Ray cluster is there to use and there is no GPU. Every table has the same bytes.
"""

from collections.abc import Iterable

from elfs_ray.config import Config, label_selector
from elfs_ray.runtime.progress import listen
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import RunDir

# With more images the work beside training takes minutes. Then Ray's workers are worth their start: each is a process
# with a lock of Python's own, and one that the machine kills for lack of memory does not end the run.
MAX_IMAGES_WITHOUT_RAY = 5_000


def connect_if_needed(config: Config, run_dir: RunDir, stages: Iterable[Stage]) -> None:
    """Connect to a Ray cluster, or start one, unless the stages can run without. Raises ConfigError.

    A pool that stage index has not listed yet counts as small.
    """
    if needs_ray(config, stages, _num_images(run_dir)):
        connect(config.ray_address, show_worker_logs=config.ray_logs)


def connect(ray_address: str | None, *, show_worker_logs: bool) -> None:
    """Connect to a Ray cluster, or start one, and report progress to its metrics. Raises ConfigError."""
    # Late imports: they import Ray, and a complete run has no use for it.
    from elfs_ray.runtime import cluster
    from elfs_ray.runtime.metrics import report_progress

    cluster.connect(ray_address, show_worker_logs=show_worker_logs)
    listen(report_progress)


def needs_ray(config: Config, stages: Iterable[Stage], num_images: int) -> bool:
    """Return whether stages need Ray for a pool of this size."""
    stages = list(stages)
    return (
        any(stage.needs_ray(config) for stage in stages)
        or any(label_selector(config, stage.section)[0] for stage in stages)
        # Only Ray knows how much memory its workers may have.
        or any(getattr(getattr(config, stage.section), "memory_gib", None) is not None for stage in stages)
        or not fits_this_process(config.ray_address, num_images)
    )


def fits_this_process(ray_address: str | None, num_images: int) -> bool:
    """Return whether so many images are few enough for one process, and there is nothing else to use: cluster or GPU.

    ray_address: as in the config.
    """
    from elfs_ray.runtime.cluster import find_devices, has_no_cluster

    return (
        num_images <= MAX_IMAGES_WITHOUT_RAY and has_no_cluster(ray_address) and find_devices(ray_address).num_gpus == 0
    )


def _num_images(run_dir: RunDir) -> int:
    """Return the number of images that the run has listed."""
    listed = run_dir.success_marker(IndexResult.stage)
    return IndexResult.from_json(listed.result).rows if listed is not None else 0
