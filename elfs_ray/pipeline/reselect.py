"""Another coreset from a finished run: only the selection is made again, beside the first, under a name of its own.

Whatever is not given stays as the run had it. The scores that the run left are read; nothing is replaced, and nothing
trained but by select.hard_fraction=search.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elfs_ray.config import Config, ConfigError, check_budgets, deciding_keys, expand_home, load_config
from elfs_ray.pipeline import coresets
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import TABLES, Marker, RunDir

KEYS = ("run_dir", "budget", "seed", "on_change", "ray_address", "ray_logs")
INPUTS = ("index", "cluster", "train")


def load(overrides: Sequence[str]) -> tuple[Config, str]:
    """The run's own config with `key=value` overrides, and the table to write. Raises ConfigError."""
    given = dict(override.partition("=")[::2] for override in overrides)
    for key in ("run_dir", "name"):
        if not given.get(key):
            raise ConfigError(f"no value for {key}: give {key}=...")
    name = given.pop("name")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"name={name!r}: needed are letters, digits, '_', '-' and '.'; it becomes a folder's name")
    fixed = [key for key in given if key not in KEYS and not key.startswith("select.")]
    if fixed:
        raise ConfigError(f"{', '.join(fixed)} cannot be given here: needed are name, select.* and {', '.join(KEYS)}")
    run_dir = RunDir(expand_home(given["run_dir"]))
    own = [override for override in overrides if not override.startswith("name=")]
    return load_config(None, own, base=config_of(run_dir)), f"{schema.CORESET}-{name}"


def describe(config: Config, table: str) -> str:
    """What `run` would write. Raises ConfigError as it does."""
    run_dir = RunDir(config.run_dir)
    action = "is there" if _is_done(config, run_dir, table) else "would be written"
    num_samples = int(run_dir.figures("train")["rows"])
    from elfs_ray.pipeline.dry_run import describe_budgets

    tables = schema.coreset_tables(config.budget, table)
    return "\n".join(
        f"{run_dir.path(own)} {action}: by {config.select.method}, {line}"
        for own, line in zip(tables, describe_budgets(config, num_samples), strict=True)
    )


def run(config: Config, table: str) -> Mapping[str, Any]:
    """Write the coreset `table`, unless it is there; its figures, as stage select has them.

    Raises ConfigError for a budget that does not fit, and for a table of that name made otherwise.
    """
    from elfs_ray.runtime.cluster import connect

    run_dir = RunDir(config.run_dir)
    if not _is_done(config, run_dir, table):
        connect(config.ray_address, show_worker_logs=config.ray_logs)
        with locked(run_dir):
            # Once more: until now another driver may have had the run directory.
            if not _is_done(config, run_dir, table):
                figures = write(config, run_dir, table)
                say(f"select    complete in {format_duration(figures['seconds'])}")
                return figures
    say(f"nothing to do: {run_dir.path(table)} is complete")
    return run_dir.figures(table)


def write(config: Config, run_dir: RunDir, table: str) -> Mapping[str, Any]:
    """Write the coreset `table` of a run directory that nobody else writes to, over Ray; its figures.

    What is there of an earlier try, or of other budgets, is replaced.
    """
    from elfs_ray.stages.select.run import select_coresets

    tables = schema.coreset_tables(config.budget, table)
    marker = marker_of(config, run_dir, table)
    found = run_dir.success_marker(table) or run_dir.started_marker(table)
    filesystem.delete(run_dir.path(table, schema.SUCCESS_FILE))
    for own in dict.fromkeys((*(coresets.tables_of(found) if found else ()), *tables)):
        if own != table:
            filesystem.delete(run_dir.path(own))
        filesystem.delete(run_dir.path(schema.coreset_text_file(own)))
    run_dir.clear(table)
    run_dir.mark_started(marker)
    start_s = time.time()
    figures = select_coresets(config, run_dir, tables)
    figures["seconds"] = round(time.time() - start_s, 3)
    figures[TABLES] = run_dir.measure([*tables, *map(schema.coreset_text_file, tables)])
    run_dir.mark_complete(Marker(table, marker.config, marker.inputs, figures))
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


def marker_of(config: Config, run_dir: RunDir, table: str) -> Marker:
    """What decides a coreset of a finished run."""
    keys = {f"select.{key}": value for key, value in deciding_keys(config.select).items()}
    inputs = {stage: run_dir.identity(stage) for stage in INPUTS}
    return Marker(table, {"seed": config.seed, "budget": config.budget, **keys}, inputs, {})


def _is_done(config: Config, run_dir: RunDir, table: str) -> bool:
    """Whether this very coreset is complete. Raises ConfigError for another one of that name, and budgets of no fit."""
    damage = [line for stage in ("index", "cluster", "select") for line in run_dir.damage(stage)]
    if damage:
        raise ConfigError(
            f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
        )
    check_budgets(config, int(run_dir.figures("train")["rows"]))
    tables = schema.coreset_tables(config.budget, table)
    coresets.refuse_foreign(run_dir, tables, table, "give another name")
    unknown = coresets.unclaimed(run_dir, tables)
    if unknown:
        raise ConfigError(
            f"{run_dir.path(unknown[0])} is there, and no marker says how it was made: delete it, or give another name"
        )
    success = run_dir.success_marker(table)
    found = success or run_dir.started_marker(table)
    same = found is not None and found.identity == marker_of(config, run_dir, table).identity
    lost = run_dir.damage(table)
    if found is not None and config.on_change != "rerun" and (lost or not same):
        how = f"is damaged: {'; '.join(lost)}" if same else "was made otherwise"
        raise ConfigError(f"{run_dir.path(table)} {how}: give another name, or on_change=rerun to replace it")
    return same and success is not None and not lost
