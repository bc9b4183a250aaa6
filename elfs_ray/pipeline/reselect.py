"""Select another coreset from a finished run, into coresets/<name>/ of its run directory.

Reads the tables of the run, its scores among them, and replaces none. Writes coreset/, coreset.txt, a
coreset-<budget>/ for each further budget and select/, in the layout of the run; then the report of the run once more,
which shows every selection. Keys that are not set keep the values of the run. Nothing is trained, except for
select.hard_fraction=search.
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

from elfs_ray.config import DIGEST, Config, ConfigError, check_budgets, expand_home, load_config
from elfs_ray.methods.encoders.processor import TORCH
from elfs_ray.pipeline import rewrite_report
from elfs_ray.pipeline.connection import connect_if_needed
from elfs_ray.pipeline.plan import wanted_marker
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.embed import num_selectable
from elfs_ray.stages.report import STAGE as REPORT
from elfs_ray.stages.select import STAGE, SelectResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, Overlay, RunDir

KEYS = ("run_dir", "budget", "seed", "on_change", "ray_address", "label_selector", "ray_logs")
SELECT = STAGE.name
SELECTION_PREFIXES = (SELECT, schema.CORESET)  # of the names that a selection writes; all others are the run's


def load(overrides: Sequence[str]) -> tuple[Config, str]:
    """Return the config of the run with `key=value` overrides, and the name of the selection. Raises ConfigError."""
    values = dict(override.partition("=")[::2] for override in overrides)
    for key in ("run_dir", "name"):
        if not values.get(key):
            raise ConfigError(f"no value for {key}: give {key}=...")
    name = values.pop("name")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"name={name!r}: must consist of letters, digits, '_', '-' and '.', as it becomes a folder's name"
        )
    fixed = [key for key in values if key not in KEYS and not key.startswith("select.")]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot be changed here, as only the selection is made again: give name, select.* or "
            f"one of {', '.join(KEYS)}"
        )
    run_dir = RunDir(expand_home(values["run_dir"]))
    keys = [override for override in overrides if not override.startswith("name=")]
    config = load_config(None, keys, base=config_of(run_dir))
    check_stages(config, run_dir)
    return config, name


def check_stages(config: Config, run_dir: RunDir) -> None:
    """Raise ConfigError for a selection that reads tables of stages that the run did not have."""
    missing = [stage for stage in STAGE.inputs(config) if run_dir.success_marker(stage) is None]
    if missing:
        method = f"select.method={config.select.method}"
        raise ConfigError(
            f"{method} needs {' and '.join(f'stage {stage}' for stage in missing)}, which the run in {run_dir.uri} did "
            f"not have, as its own selection needed no more: run the pipeline with {method} in another run_dir, or in "
            "this one with on_change=rerun"
        )


def folder_of(config: Config, name: str) -> Overlay:
    """Return the folder of a named selection, which reads all other tables from the run directory around it."""
    run_dir = RunDir(config.run_dir)
    selected = run_dir.success_marker(SELECT)
    # A run with training dynamics whose own selection did not use them has no scores yet: they become the folder's.
    has_scores = selected is None or schema.SCORES in selected.outputs
    prefixes = SELECTION_PREFIXES if has_scores else (*SELECTION_PREFIXES, schema.SCORES)
    return Overlay(run_dir.path(schema.CORESETS_DIR, name), run_dir, prefixes)


def describe(config: Config, name: str) -> str:
    """Return what `run` would write, a line for each coreset. Raises ConfigError as `run` does."""
    folder = folder_of(config, name)
    action = "is complete" if _is_done(config, folder) else "would be written"
    from elfs_ray.pipeline.dry_run import describe_budgets

    lines = describe_budgets(config, num_selectable(folder))
    return "\n".join(
        f"{folder.path(table)} {action}: by {config.select.method}, {line}"
        for table, line in zip(schema.coreset_tables(config.budgets), lines, strict=True)
    )


def run(config: Config, name: str) -> SelectResult:
    """Make the selection `name`, unless it is complete; return the result of stage select.

    Raises ConfigError for a budget that does not fit, and for a selection of that name with other keys.
    """
    folder = folder_of(config, name)
    if not _is_done(config, folder):
        connect_if_needed(config, folder.base, [STAGE])
        with locked(folder.base):
            # Checked again: until this one got the lock, another driver may have made this very selection.
            if not _is_done(config, folder):
                marker = write(config, folder)
                say(f"select    complete in {format_duration(marker.seconds)}")
                _show_on_page(folder.base)
                return SelectResult.from_json(marker.result)
    say(f"nothing to do: {folder.uri} is complete")
    return SelectResult.read(folder)


def write(config: Config, folder: Overlay) -> Marker:
    """Select into a folder that nobody else writes to; return the marker of stage select.

    Resumes a selection that was started with the same config; deletes anything else in the folder.
    """
    marker = marker_of(config, folder)
    started = folder.started_marker(SELECT)
    if folder.success_marker(SELECT) or started is None or not started.is_made_as(marker):
        filesystem.delete(folder.uri)
    folder.mark_started(marker)
    start_s = time.time()
    result = STAGE.run(config, folder)
    complete = dataclasses.replace(
        marker,
        result=result.to_json(),
        # Without scores/, which belongs to the run and may be replaced with it.
        outputs=folder.measure(name for name in marker.outputs if name.startswith(folder.prefixes)),
        seconds=round(time.time() - start_s, 3),
    )
    folder.mark_complete(complete)
    return complete


def _show_on_page(run_dir: RunDir) -> None:
    """Write the report of the run again, if it has one: it shows every selection."""
    if run_dir.success_marker(REPORT.name) is None:
        return
    try:
        rewrite_report.write(rewrite_report.load([f"run_dir={run_dir.uri}"]), run_dir)
    except ConfigError as error:  # such as damage to a table that the selection did not need
        say(f"report    not written again: {error}")


def config_of(run_dir: RunDir) -> dict[str, Any]:
    """Return the keys of a finished run that a selection reads, nested as in YAML, from the run's markers.

    Keys that a config must have but a selection does not read, such as the pool, are taken from the run as well.

    Raises ConfigError for a run that is not complete up to stage select.
    """
    base: dict[str, Any] = {"embed": {}, "duplicates": {}, "train": {}, "select": {}}
    for stage, is_optional in (("select", False), ("train", True), ("duplicates", True), ("embed", False)):
        marker = run_dir.success_marker(stage)
        if marker is None:
            if is_optional:
                continue
            raise ConfigError(f"{run_dir.uri} has no complete stage {stage}: run the pipeline there first")
        for key, value in marker.config.items():
            if key.endswith(DIGEST):
                continue
            section, _, name = key.rpartition(".")
            (base[section] if section else base)[name] = value
    base["embed"].setdefault("runtime", TORCH)  # the only one that leaves no key
    # A run without a search has no search_* keys among those that decide, but may have been told them.
    base["select"] |= SelectResult.read(run_dir).search
    index = run_dir.success_marker("index")
    assert index is not None, run_dir.uri
    graph = run_dir.table_files(schema.NEIGHBORS)
    num_neighbors = filesystem.read_schema(graph[0]).field(schema.NEIGHBOR_IDS).type.list_size if graph else 0
    is_clustered = run_dir.success_marker(ClusterResult.stage) is not None
    num_clusters = ClusterResult.read(run_dir).num_clusters if is_clustered else "auto"
    cluster = {"num_clusters": num_clusters, "num_neighbors": num_neighbors}
    return base | {"pool": {"uri": index.config["pool.uri"]}, "cluster": cluster}


def marker_of(config: Config, run_dir: RunDir) -> Marker:
    """Return the marker with which a selection from a finished run starts."""
    return wanted_marker(STAGE, config, {stage: run_dir.complete_marker(stage) for stage in STAGE.inputs(config)})


def _is_done(config: Config, folder: Overlay) -> bool:
    """Return whether this very selection is complete.

    Raises ConfigError for a damaged run, a budget that does not fit it, and a folder that holds anything else.
    """
    run_dir = folder.base
    damage = [line for stage in (*STAGE.inputs(config), SELECT) for line in run_dir.damage(stage)]
    if damage:
        raise ConfigError(
            f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
        )
    check_budgets(config, num_selectable(run_dir))
    success = folder.success_marker(SELECT)
    present = success or folder.started_marker(SELECT)
    lost = folder.damage(SELECT)
    is_same = present is not None and present.is_made_as(marker_of(config, folder))
    if config.on_change == "rerun":
        return is_same and success is not None and not lost
    if present is None and filesystem.list_files(folder.uri, recursive=True):
        problem = "holds files, and no marker says how they were made"
    elif present is not None and not is_same:
        problem = "was made with other keys"
    elif lost:
        problem = f"is damaged: {'; '.join(lost)}"
    else:
        return success is not None
    raise ConfigError(f"{folder.uri} {problem}: give another name, or on_change=rerun to replace it")
