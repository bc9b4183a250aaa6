"""elfs_ray: label-free coreset selection (ELFS, ICLR 2025) as a distributed batch job on Ray.

    pool ──► index ──► embed ──► cluster ──► train ──► select ──► coreset + report

Given a pool of unlabelled images and a budget, it selects the images that are worth labelling.

    import elfs_ray
    config = elfs_ray.load_config(elfs_ray.preset("photos"), ["pool.uri=photos", "run_dir=runs/photos", "budget=200"])
    elfs_ray.run(config)
"""

from elfs_ray.version import __version__

__all__ = ["__version__", "load_config", "preset", "run"]


def __getattr__(name: str):
    # Imported on first use: a Ray worker imports elfs_ray.methods only, and must not load the pipeline for it.
    if name == "run":
        from elfs_ray.evaluation.job import run

        return run
    if name == "load_config":
        from elfs_ray.config import load_config

        return load_config
    if name == "preset":
        from elfs_ray.presets import preset

        return preset
    raise AttributeError(f"module 'elfs_ray' has no attribute '{name}'")
