"""Another coreset from a finished run: only the selection is made again, into coresets/<name>/ of the run directory.

There it has the layout of the run's own: coreset/, coreset.txt, a coreset-<budget>/ for every further budget, select/.
Whatever is not given stays as the run had it. The scores that the run left are read; nothing of the run is replaced,
and nothing is trained except by select.hard_fraction=search.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elfs_ray.config import Config, ConfigError, check_budgets, deciding_keys, expand_home, load_config
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import TABLES, Marker, Overlay, RunDir

KEYS = ("run_dir", "budget", "seed", "on_change", "ray_address", "ray_logs")
SELECT = "select"
INPUTS = ("index", "cluster", "train")
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

    lines = describe_budgets(config, int(folder.figures("train")["rows"]))
    return "\n".join(
        f"{folder.path(table)} {action}: by {config.select.method}, {line}"
        for table, line in zip(schema.coreset_tables(config.budgets), lines, strict=True)
    )


def run(config: Config, name: str) -> Mapping[str, Any]:
    """Make the selection `name`, unless it is there; return its figures, as stage select has them.

    Raises ConfigError for a budget that does not fit, and for a selection of that name made otherwise.
    """
    from elfs_ray.runtime.cluster import connect

    folder = folder_of(config, name)
    if not _is_done(config, folder):
        connect(config.ray_address, show_worker_logs=config.ray_logs)
        with locked(folder.base):
            # Once more: until now another driver may have had the run directory.
            if not _is_done(config, folder):
                figures = write(config, folder)
                say(f"select    complete in {format_duration(figures['seconds'])}")
                return figures
    say(f"nothing to do: {folder.uri} is complete")
    return folder.figures(SELECT)


def write(config: Config, folder: Overlay) -> Mapping[str, Any]:
    """Select into a folder that nobody else writes to, over Ray; return the figures of stage select.

    What an unfinished try with the same config left is continued, anything else in the folder is replaced.
    """
    from elfs_ray.stages.select.run import run_select

    marker = marker_of(config, folder)
    started = folder.started_marker(SELECT)
    if folder.success_marker(SELECT) or started is None or started.identity != marker.identity:
        filesystem.delete(folder.uri)
    folder.mark_started(marker)
    start_s = time.time()
    figures = dict(run_select(config, folder))
    figures["seconds"] = round(time.time() - start_s, 3)
    tables = schema.coreset_tables(config.budgets)
    figures[TABLES] = folder.measure([*tables, *map(schema.coreset_text_file, tables)])
    folder.mark_complete(Marker(SELECT, marker.config, marker.inputs, figures))
    return figures


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
    base["select"] |= run_dir.figures("select").get("search", {})
    index = run_dir.success_marker("index")
    assert index is not None, run_dir.uri
    graph = run_dir.table_files(schema.NEIGHBORS)
    num_neighbors = filesystem.read_schema(graph[0]).field(schema.NEIGHBOR_IDS).type.list_size if graph else 0
    num_clusters = int(run_dir.figures("cluster")["num_clusters"])
    cluster = {"num_clusters": num_clusters, "num_neighbors": num_neighbors}
    return base | {"pool": {"uri": index.config["pool.uri"]}, "cluster": cluster}


def marker_of(config: Config, run_dir: RunDir) -> Marker:
    """Return the marker of a selection from a finished run, without figures."""
    keys = {f"select.{key}": value for key, value in deciding_keys(config.select).items()}
    inputs = {stage: run_dir.identity(stage) for stage in INPUTS}
    return Marker(SELECT, {"seed": config.seed, "budget": config.budget, **keys}, inputs, {})


def _is_done(config: Config, folder: Overlay) -> bool:
    """Return whether this very selection is complete. Raises ConfigError for another one, and budgets of no fit."""
    run_dir = folder.base
    damage = [line for stage in ("index", "cluster", SELECT) for line in run_dir.damage(stage)]
    if damage:
        raise ConfigError(
            f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
        )
    check_budgets(config, int(run_dir.figures("train")["rows"]))
    success = folder.success_marker(SELECT)
    present = success or folder.started_marker(SELECT)
    lost = folder.damage(SELECT)
    is_same = present is not None and present.identity == marker_of(config, folder).identity
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
