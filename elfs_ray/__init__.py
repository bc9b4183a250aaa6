"""elfs_ray: label-free coreset selection (ELFS, ICLR 2025) as a distributed batch job on Ray.

    pool ──► index ──► embed ──► cluster ──► train ──► select ──► coreset + report

Given a pool of unlabelled images and a budget, it selects the images that are worth labelling.

    import elfs_ray
    config = elfs_ray.load_config(elfs_ray.preset("photos"), ["pool.uri=photos", "run_dir=runs/photos", "budget=200"])
    run = elfs_ray.run(config)                      # on Ray, from images; run.coreset is a table
    elfs_ray.export(run, to="label-studio")         # or run.export(to="label-studio")
    elfs_ray.select(embeddings, 200).ids            # from an array, in this process
"""

import importlib

from elfs_ray.version import __version__

__all__ = ["Run", "__version__", "export", "load_config", "preset", "run", "select"]

# Imported on first use: a Ray worker imports elfs_ray.methods only, and must not load the pipeline for it.
_MODULES = {
    "Run": "elfs_ray.api",
    "export": "elfs_ray.handover.export",
    "load_config": "elfs_ray.config",
    "preset": "elfs_ray.presets",
    "run": "elfs_ray.api",
    "select": "elfs_ray.methods.selection.in_memory",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'elfs_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
