"""Another coreset from a finished run: only the selection is made again, into coresets/<name>/ of the run directory.

There it has the layout of the run's own: coreset/, coreset.txt, a coreset-<budget>/ for every further budget, select/.
Whatever is not given stays as the run had it. The scores that the run left are read; nothing of the run is replaced,
and nothing is trained except by select.hard_fraction=search.
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

from elfs_ray.config import Config, ConfigError, check_budgets, expand_home, load_config
from elfs_ray.pipeline.plan import wanted_marker
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select import STAGE, SelectResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, Overlay, RunDir

KEYS = ("run_dir", "budget", "seed", "on_change", "ray_address", "ray_logs")
SELECT = STAGE.name
OWN_TABLES = (SELECT, schema.CORESET)  # what a selection writes; all else is the run's


def load(overrides: Sequence[str]) -> tuple[Config, str]:
    """Return the run's own config with `key=value` overrides, and the name of the selection. Raises ConfigError."""
    values = dict(override.partition("=")[::2] for override in overrides)
    for key in ("run_dir", "name"):
        if not values.get(key):
            raise ConfigError(f"no value for {key}: give {key}=...")
    name = values.pop("name")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"name={name!r}: must be made of letters, digits, '_', '-' and '.', as it becomes a folder's name"
        )
    fixed = [key for key in values if key not in KEYS and not key.startswith("select.")]
    if fixed:
        raise ConfigError(f"{', '.join(fixed)} cannot be given here: give name, select.* or one of {', '.join(KEYS)}")
    run_dir = RunDir(expand_home(values["run_dir"]))
    keys = [override for override in overrides if not override.startswith("name=")]
    return load_config(None, keys, base=config_of(run_dir)), name


def folder_of(config: Config, name: str) -> Overlay:
    """Return the folder of a named selection, which reads from the run directory that it is in."""
    run_dir = RunDir(config.run_dir)
    return Overlay(run_dir.path(schema.CORESETS_DIR, name), run_dir, OWN_TABLES)


def describe(config: Config, name: str) -> str:
    """Describe what `run` would write. Raises ConfigError as it does."""
    folder = folder_of(config, name)
    action = "is there" if _is_done(config, folder) else "would be written"
    from elfs_ray.pipeline.dry_run import describe_budgets

    lines = describe_budgets(config, TrainResult.read(folder).rows)
    return "\n".join(
        f"{folder.path(table)} {action}: by {config.select.method}, {line}"
        for table, line in zip(schema.coreset_tables(config.budgets), lines, strict=True)
    )


def run(config: Config, name: str) -> SelectResult:
    """Make the selection `name`, unless it is there; return what stage select returns.

    Raises ConfigError for a budget that does not fit, and for a selection of that name made otherwise.
    """
    from elfs_ray.runtime.cluster import connect

    folder = folder_of(config, name)
    if not _is_done(config, folder):
        connect(config.ray_address, show_worker_logs=config.ray_logs)
        with locked(folder.base):
            # Once more: until now another driver may have had the run directory.
            if not _is_done(config, folder):
                marker = write(config, folder)
                say(f"select    complete in {format_duration(marker.seconds)}")
                return SelectResult.from_json(marker.result)
    say(f"nothing to do: {folder.uri} is complete")
    return SelectResult.read(folder)


def write(config: Config, folder: Overlay) -> Marker:
    """Select into a folder that nobody else writes to, over Ray; return the marker of stage select.

    What an unfinished try with the same config left is continued, anything else in the folder is replaced.
    """
    from elfs_ray.stages.select.run import run_select

    marker = marker_of(config, folder)
    started = folder.started_marker(SELECT)
    if folder.success_marker(SELECT) or started is None or not started.is_made_as(marker):
        filesystem.delete(folder.uri)
    folder.mark_started(marker)
    start_s = time.time()
    result = run_select(config, folder)
    complete = dataclasses.replace(
        marker,
        result=result.to_json(),
        # scores/ is the run's, and not measured here.
        outputs=folder.measure(name for name in marker.outputs if name.startswith(OWN_TABLES)),
        seconds=round(time.time() - start_s, 3),
    )
    folder.mark_complete(complete)
    return complete


def config_of(run_dir: RunDir) -> dict[str, Any]:
    """What a run directory says of its own selection, images and training, nested; with what every config needs."""
    base: dict[str, Any] = {"embed": {}, "train": {}, "select": {}}
    for stage in ("select", "train", "embed"):
        marker = run_dir.success_marker(stage)
        if marker is None:
            raise ConfigError(f"{run_dir.uri} has no complete stage {stage}: run the pipeline there first")
        for key, value in marker.config.items():
            section, _, name = key.rpartition(".")
            (base[section] if section else base)[name] = value
    base["select"] |= SelectResult.read(run_dir).search
    index = run_dir.success_marker("index")
    assert index is not None, run_dir.uri
    graph = run_dir.table_files(schema.NEIGHBORS)
    num_neighbors = filesystem.read_schema(graph[0]).field(schema.NEIGHBOR_IDS).type.list_size if graph else 0
    num_clusters = ClusterResult.read(run_dir).num_clusters
    cluster = {"num_clusters": num_clusters, "num_neighbors": num_neighbors}
    return base | {"pool": {"uri": index.config["pool.uri"]}, "cluster": cluster}


def marker_of(config: Config, run_dir: RunDir) -> Marker:
    """Return the marker that a selection from a finished run starts with."""
    return wanted_marker(STAGE, config, {stage: run_dir.complete_marker(stage) for stage in STAGE.inputs(config)})


def _is_done(config: Config, folder: Overlay) -> bool:
    """Return whether this very selection is complete. Raises ConfigError for another one, and budgets of no fit."""
    run_dir = folder.base
    damage = [line for stage in ("index", "cluster", SELECT) for line in run_dir.damage(stage)]
    if damage:
        raise ConfigError(
            f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
        )
    check_budgets(config, TrainResult.read(run_dir).rows)
    success = folder.success_marker(SELECT)
    present = success or folder.started_marker(SELECT)
    lost = folder.damage(SELECT)
    is_same = present is not None and present.is_made_as(marker_of(config, folder))
    if config.on_change == "rerun":
        return is_same and success is not None and not lost
    if present is None and filesystem.list_files(folder.uri, recursive=True):
        how = "holds files, and no marker says how they were made"
    elif present is not None and not is_same:
        how = "was made otherwise"
    elif lost:
        how = f"is damaged: {'; '.join(lost)}"
    else:
        return success is not None
    raise ConfigError(f"{folder.uri} {how}: give another name, or on_change=rerun to replace it")
