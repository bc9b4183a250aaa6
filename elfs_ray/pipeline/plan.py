"""Decide for each stage whether a run skips, resumes, runs or replaces it, and check all that can be checked before."""

import json
import posixpath
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate

from elfs_ray.config import Config, ConfigError, check_against_pool
from elfs_ray.pipeline.replace import describe_obstacles, has_written, replaced_names
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.pool.files import UNIT_NOUNS
from elfs_ray.pool.listing import PoolColumns, Remarks, Unit, check_listing, count_unit, find_units
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import BadMarkerError, Marker, RunDir

MIN_UNITS_COUNTED = 64  # of more than twice as many tars or folders, only every second, third, ... is counted


@dataclass(frozen=True)
class PoolCount:
    """The number of samples in a pool, its format, and the remarks of the listing.

    `basis` says what the number was estimated from, and is empty for an exact count.
    """

    num_samples: int
    basis: str = ""
    format: str = ""
    remarks: Remarks = field(default_factory=Remarks)

    @property
    def is_exact(self) -> bool:
        return not self.basis


@dataclass(frozen=True)
class PlannedStage:
    """What a run does with a stage.

    action: 'done' for a complete stage; 'continue' for one that was started in the same way; 'run' for one that has
        left nothing; 'rerun' for one whose tables must be replaced, because of `differences`: they were made with
        another config or from other inputs, no marker accounts for them, or they are damaged.
    marker: the marker that a complete or started stage has, else the one that it will start with.
    """

    stage: Stage
    action: str
    marker: Marker
    differences: tuple[str, ...] = ()


def check(config: Config, run_dir: RunDir, pool: PoolCount | None = None) -> list[PlannedStage]:
    """Check everything that can be checked before work starts; return the plan.

    pool: the size of the pool, where it cannot be counted yet.

    Raises ConfigError.
    """
    try:
        _check_places(config, run_dir)
        plan = make_plan(config, run_dir)
        refuse_differences(plan, config, run_dir)
        for planned in plan:
            if planned.action != "done":
                planned.stage.check(config)
        _check_size(config, run_dir, plan, pool)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return plan


def _check_places(config: Config, run_dir: RunDir) -> None:
    if filesystem.exists(run_dir.uri) and not filesystem.is_dir(run_dir.uri):
        raise ConfigError(f"run_dir={config.run_dir} is a file: give a folder, which need not exist yet")
    folders = list(accumulate(run_dir.uri.split("/"), "{}/{}".format))
    if any(
        filesystem.is_within(run_dir.uri, pool)
        or any(fnmatchcase(folder, filesystem.absolute(pool)) for folder in folders)
        for pool in config.pool.uris
    ):
        raise ConfigError(
            f"run_dir={config.run_dir} is in the pool, pool.uri={config.pool.uri}: its tables would be listed as "
            "images by the next run. Give a folder outside of the pool"
        )
    # A pool beside the tables is fine, but a stage deletes its own folders before it runs again.
    written = {name for stage in stages_of(config) for name in (stage.name, *stage.outputs(config))}
    for name in sorted(written):
        if any(filesystem.is_within(pool, run_dir.path(name)) for pool in config.pool.uris):
            raise ConfigError(
                f"pool.uri={config.pool.uri} is in {run_dir.path(name)}, which this run writes: give another run_dir"
            )


def _refuse_listed_tables(config: Config, run_dir: RunDir, units: list[Unit]) -> None:
    """Raise ConfigError for a pool that leads into the run directory through a link."""
    # The parents of files, as there are far fewer of them than files.
    folders = {unit.uri if unit.format == "folder" else posixpath.dirname(unit.uri) for unit in units}
    trees = {unit.uri for unit in units if unit.format == "folder" and unit.recursive}
    inside = [folder for folder in folders if filesystem.is_within(folder, run_dir.uri)]
    inside += [folder for folder in trees if filesystem.is_within(run_dir.uri, folder)]
    # A pool that lies beside the tables in the run directory itself is found there without a link.
    if inside and not any(filesystem.is_within(pool, run_dir.uri) for pool in config.pool.uris):
        raise ConfigError(
            f"run_dir={config.run_dir} is in the pool, pool.uri={config.pool.uri}, through the link {min(inside)}: its "
            "tables would be listed as images. Remove the link, or give a folder outside of the pool"
        )


def make_plan(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """Return what a run does with each stage. Raises ConfigError for a marker that cannot be read."""
    plan: list[PlannedStage] = []
    markers: dict[str, Marker] = {}
    for stage in stages_of(config):
        planned = plan_stage(stage, config, run_dir, markers)
        # A stage that is to rerun passes on a new run_id, so whatever was made from its old tables reruns, too.
        markers[stage.name] = planned.marker
        plan.append(planned)
    return plan


def plan_stage(stage: Stage, config: Config, run_dir: RunDir, markers: Mapping[str, Marker]) -> PlannedStage:
    """Return what a run does with one stage; `markers` are those of the stages before it."""
    wanted = wanted_marker(stage, config, markers)
    try:
        success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
        obstacles = tuple(describe_obstacles(stage, config, run_dir))
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error
    present = success or started
    if started and not success and not started.is_made_as(wanted) and not has_written(started, run_dir):
        present = None  # nothing is lost if it starts with another config
    if present is None:
        # Tables without any marker may be of another config, so they are replaced and never continued.
        return PlannedStage(stage, "rerun" if obstacles else "run", wanted, obstacles)
    changes = _missing(present, wanted) if present.is_made_as(wanted) else _changes(present, wanted)
    differences = (*changes, *obstacles, *run_dir.damage(stage.name))
    if differences:
        return PlannedStage(stage, "rerun", wanted, differences)
    # The present marker rather than the wanted one: it has the run_id that later stages record as their input.
    return PlannedStage(stage, "done" if success else "continue", present)


def wanted_marker(stage: Stage, config: Config, markers: Mapping[str, Marker]) -> Marker:
    """Return the marker with which a stage would start; `markers` are those of the stages before it."""
    inputs = {name: markers[name] for name in stage.inputs(config)}
    return Marker(
        stage.name,
        stage.deciding_config(config),
        {name: marker.identity for name, marker in inputs.items()},
        # Random: tables that are made twice may differ under one identity, as the images of the pool may have changed.
        run_id=secrets.token_hex(8),
        input_runs={name: marker.run_id for name, marker in inputs.items()},
        outputs={name: {} for name in stage.outputs(config)},
    )


def _check_size(config: Config, run_dir: RunDir, plan: list[PlannedStage], pool: PoolCount | None = None) -> None:
    """Check the config against the counts of complete stages, else against the pool if it can be counted exactly."""
    for planned in plan:
        if planned.action == "done":
            planned.stage.check_result(config, run_dir)
    if is_done(IndexResult, plan):
        check_listed(config, run_dir, plan)
    else:
        pool = pool or count_pool(config, run_dir, plan)
        # On an estimate nobody is refused: stage index checks the exact count once it has it.
        if pool.is_exact:
            check_against_pool(config, pool.num_samples)


def check_listed(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> None:
    """Check the stages that are to run against the samples in index/. Raises ConfigError."""
    for planned in plan:
        if planned.action != "done":
            try:
                planned.stage.check_listed(config, run_dir)
            except ValueError as error:
                raise ConfigError(str(error)) from error


def is_done(result: type[Result], plan: list[PlannedStage]) -> bool:
    """Return whether the stage with this result is complete, and was made with the config of the plan."""
    return any(planned.stage.result is result and planned.action == "done" for planned in plan)


def count_pool(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> PoolCount:
    """Return the number of samples in the pool: from index/ where it is complete, else from the listing.

    Of 128 or more tars or folders, at least 64 are counted, and the others are assumed to hold as many on average.

    Memory: the listings of 16 tars or bucket folders at a time (see pool/listing.py), else almost none.
    """
    if is_done(IndexResult, plan):
        index = IndexResult.read(run_dir)
        return PoolCount(index.rows, "", index.format, index.remarks)
    remarks = Remarks()
    units = find_units(config.pool.uri, config.pool.format, remarks)
    _refuse_listed_tables(config, run_dir, units)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    kind = units[0].format
    # A Parquet file has its number of rows in its footer; a tar must be read and a folder listed, so these are sampled.
    step = 1 if kind == "parquet" else max(1, len(units) // MIN_UNITS_COUNTED)
    counted = units[::step]

    def count(unit: Unit) -> tuple[int, Remarks]:
        of_unit = Remarks()  # of its own, as a Counter is not safe for several threads
        return count_unit(unit, columns, of_unit), of_unit

    total = 0
    with ThreadPoolExecutor(16) as threads:  # which mostly wait for a disk or an object store
        for num_samples, of_unit in threads.map(count, counted):
            total += num_samples
            remarks.add(of_unit)
    check_listing(config.pool.uri, config.pool.format, units, total, remarks)
    if step == 1:
        return PoolCount(total, "", kind, remarks)
    basis = f"{len(counted):,} of its {len(units):,} {UNIT_NOUNS[kind]}s"
    return PoolCount(round(total * len(units) / len(counted)), basis, kind, remarks)


def _changes(present: Marker, wanted: Marker) -> tuple[str, ...]:
    """Return how two markers of one stage differ, in at least one line."""
    lines = []
    for key in sorted(set(present.config) | set(wanted.config)):
        # Compared as the JSON that the identity hashes: 1 and 1.0 are equal in Python but differ there, and a budget of
        # 1 is one sample where 1.0 is the whole pool.
        before, now = (
            json.dumps(marker.config[key], sort_keys=True) if key in marker.config else "not set"
            for marker in (present, wanted)
        )
        if before != now:
            lines.append(f"{key}: {before} in the run directory, {now} now")
    names = dict.fromkeys((*wanted.inputs, *present.inputs))
    changed = [name for name in names if _input(present, name) != _input(wanted, name)]
    return tuple(lines) or (f"made from another {', '.join(changed)}",)


def _missing(present: Marker, wanted: Marker) -> tuple[str, ...]:
    """Return a line for each table or file that is wanted and that the stage did not write for an earlier config."""
    missing = [name for name in wanted.outputs if name not in present.outputs]
    return tuple(f"{name} is needed now, and was not written" for name in missing)


def _input(marker: Marker, name: str) -> tuple[str | None, str | None]:
    return marker.inputs.get(name), marker.input_runs.get(name)


def refuse_differences(plan: list[PlannedStage], config: Config, run_dir: RunDir) -> None:
    """Raise ConfigError if stages would be replaced and config.on_change does not allow it."""
    replaced = [planned for planned in plan if planned.action == "rerun"]
    if not replaced or config.on_change == "rerun":
        return
    lines = [f"  {planned.stage.name}: {line}" for planned in replaced for line in planned.differences]
    folders = dict.fromkeys(
        name for planned in replaced for name in replaced_names(planned.stage, planned.marker, run_dir)
    )
    raise ConfigError(
        f"{run_dir.uri} was made with another config, or is damaged:\n" + "\n".join(lines) + "\nRestore the config or "
        "the files, give another run_dir, or give on_change=rerun to replace "
        f"{', '.join(planned.stage.name for planned in replaced)}, which deletes there: {', '.join(folders)}."
    )
