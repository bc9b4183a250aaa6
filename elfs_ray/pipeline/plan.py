"""Decide for each stage whether a run skips, resumes, runs or replaces it, and check all that can be checked before."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate

from elfs_ray.config import Config, ConfigError, check_against_pool
from elfs_ray.pipeline.pool_change import (
    MIN_UNITS_COUNTED,
    PoolChange,
    find_change,
    refuse_change,
    refuse_listed_tables,
)
from elfs_ray.pipeline.replace import HALF_REMOVED, POOL_CHANGED, describe_obstacles, has_written, replaced_names
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.pool.files import UNIT_NOUNS
from elfs_ray.pool.listing import PoolColumns, Remarks, check_listing, count_unit, find_units, map_in_threads
from elfs_ray.runtime.progress import count, format_duration
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import BadMarkerError, Marker, RunDir


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
        another config or from other inputs, no marker accounts for them, or they are damaged. If only the pool has
        changed, 'extend' for one that appends to its tables, and 'update' for one whose tables must be replaced.
    marker: the marker that a complete or started stage has, else the one that it will start with.
    pool_change: of stage index, how the pool differs from index/, if it does.
    """

    stage: Stage
    action: str
    marker: Marker
    differences: tuple[str, ...] = ()
    pool_change: PoolChange | None = None


def check(config: Config, run_dir: RunDir, pool: PoolCount | None = None) -> list[PlannedStage]:
    """Check everything that can be checked before work starts; return the plan.

    pool: the size of the pool, where it cannot be counted yet.

    Raises ConfigError.
    """
    try:
        _check_places(config, run_dir)
        plan = make_plan(config, run_dir)
        refuse_differences(plan, config, run_dir)
        # The job itself will write a pool that cannot be counted yet.
        if pool is None and config.on_pool_change != "keep" and is_done(IndexResult, plan):
            plan = _compare_with_pool(config, run_dir, plan)
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
    written = {schema.GONE, *(name for stage in stages_of(config) for name in (stage.name, *stage.outputs(config)))}
    for name in sorted(written):
        if any(filesystem.is_within(pool, run_dir.path(name)) for pool in config.pool.uris):
            raise ConfigError(
                f"pool.uri={config.pool.uri} is in {run_dir.path(name)}, which this run writes: give another run_dir"
            )


def _compare_with_pool(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> list[PlannedStage]:
    """Return the plan that follows the changes of the pool, as far as config.on_pool_change says.

    Raises ConfigError if it says to refuse them.
    """
    change = find_change(config, run_dir)
    if not change.changes:
        return plan
    refuse_change(change.changes, config)
    extended = make_plan(config, run_dir, change)
    trained = [planned for planned in extended if planned.stage.trains and planned.action == "update"]
    if config.on_pool_change == "extend" or not trained:
        return extended
    again = " and ".join(planned.stage.name for planned in trained)
    reason = f"not followed, as {again} would train from the start; on_pool_change=extend does that"
    return make_plan(config, run_dir, replace(change, reason_to_keep=reason))


def make_plan(config: Config, run_dir: RunDir, change: PoolChange | None = None) -> list[PlannedStage]:
    """Return what a run does with each stage. Raises ConfigError for a marker that cannot be read.

    change: how the pool differs from index/, if it does.
    """
    plan: list[PlannedStage] = []
    markers: dict[str, Marker] = {}
    for stage in stages_of(config):
        planned = plan_stage(stage, config, run_dir, markers)
        # A stage that is to rerun passes on a new run_id, so whatever was made from its old tables reruns, too.
        markers[stage.name] = planned.marker
        if stage.result is IndexResult:
            planned, markers[stage.name] = extend_index(planned, change)
        plan.append(planned)
    return plan


def extend_index(planned: PlannedStage, change: PoolChange | None) -> tuple[PlannedStage, Marker]:
    """Return what a run does with stage index, and the marker that later stages are planned by, after a change."""
    marker = planned.marker
    if planned.action == "continue" and marker.follows:
        # How many images it will append is not known before it has listed the pool.
        return planned, replace(marker, result={})
    # Another driver may have extended the run since the pool was compared.
    if change is None or planned.action != "done" or marker.run_id != change.index_run:
        return planned, marker
    line = change.changes.describe()
    if change.reason_to_keep:
        lines = (f"the pool has changed: {line}; {change.reason_to_keep}",)
        return replace(planned, differences=lines, pool_change=change), marker
    # It starts with the result of the listing to which it appends: until it is complete, only that one counts.
    started = replace(
        following(marker, marker),
        run_id=secrets.token_hex(8),
        outputs={name: {} for name in (*marker.outputs, schema.GONE)},
        result=marker.result,
    )
    rows = IndexResult.from_json(marker.result).rows + change.changes.num_appended
    extended = PlannedStage(planned.stage, "extend", started, (f"the pool has changed: {line}",), change)
    return extended, replace(started, result={"rows": rows})


def following(wanted: Marker, present: Marker) -> Marker:
    """Return a marker that follows the present one, because the pool has changed."""
    follows = {**present.follows, present.run_id: int(present.result.get("rows", 0))}
    return replace(wanted, follows=follows, seconds=0.0, versions={})


def plan_stage(stage: Stage, config: Config, run_dir: RunDir, markers: Mapping[str, Marker]) -> PlannedStage:
    """Return what a run does with one stage; `markers` are those of the stages before it."""
    wanted = wanted_marker(stage, config, markers)
    try:
        success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
        obstacles = tuple(describe_obstacles(stage, config, run_dir))
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error
    present = success or started
    is_unlike = present is not None and not present.is_made_as(wanted)
    is_due_to_pool = present is not None and is_unlike and _is_due_to_pool(present, wanted, markers)
    if is_unlike and not is_due_to_pool and started and not success and not has_written(started, run_dir):
        present = None  # nothing is lost if it starts with another config; after a change of the pool it goes on
    if present is None:
        # Tables without any marker may be of another config, so they are replaced and never continued.
        return PlannedStage(stage, "rerun" if obstacles else "run", wanted, obstacles)
    changes = _changes(present, wanted) if is_unlike else ()
    missing = _missing(present, wanted) if not is_unlike or is_due_to_pool else ()
    differences = (*changes, *missing, *obstacles, *run_dir.damage(stage.name))
    if is_due_to_pool and differences == changes:
        return _follow_inputs(stage, present, wanted, markers, is_complete=success is not None)
    if differences:
        return PlannedStage(stage, "rerun", wanted, differences)
    # The present marker rather than the wanted one: it has the run_id that later stages record as their input.
    return PlannedStage(stage, "done" if success else "continue", present)


def _is_due_to_pool(present: Marker, wanted: Marker, markers: Mapping[str, Marker]) -> bool:
    """Return whether a stage differs from what is wanted only because the pool has changed."""
    config = dict(present.config)
    if config.get(HALF_REMOVED) == POOL_CHANGED:
        del config[HALF_REMOVED]
    return replace(present, config=config).identity == wanted.identity and all(
        present.input_runs.get(name) in (run_id, *markers[name].follows) for name, run_id in wanted.input_runs.items()
    )


def _follow_inputs(
    stage: Stage, present: Marker, wanted: Marker, markers: Mapping[str, Marker], *, is_complete: bool
) -> PlannedStage:
    """Return what a run does with a stage whose inputs have followed a change of the pool."""
    changed = [name for name, run_id in wanted.input_runs.items() if present.input_runs[name] != run_id]
    if stage.grows and changed == [IndexResult.stage]:
        index = markers[IndexResult.stage]
        num_ids, num_ids_before = index.result.get("rows"), index.follows[present.input_runs[index.stage]]
        if num_ids == num_ids_before:  # images are gone, and none are new
            return PlannedStage(stage, "done" if is_complete else "continue", present)
        lines = () if num_ids is None else (f"{count(num_ids - num_ids_before, 'new image')}",)
        return PlannedStage(stage, "extend", following(wanted, present), lines)
    lines = ("as the pool has changed, it runs again from the start",)
    if present.seconds:
        lines = (f"{lines[0]}, which took {format_duration(present.seconds)} the last time",)
    return PlannedStage(stage, "update", following(wanted, present), lines)


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
    change = plan[0].pool_change
    if change is not None and plan[0].action == "extend":
        return PoolCount(change.changes.num_present, change.changes.basis, change.format, change.remarks)
    if is_done(IndexResult, plan):
        index = IndexResult.read(run_dir)
        return PoolCount(index.present, "", index.format, index.remarks)
    remarks = Remarks()
    units = find_units(config.pool.uri, config.pool.format, remarks)
    refuse_listed_tables(config, run_dir, units)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    kind = units[0].format
    # A Parquet file has its number of rows in its footer; a tar must be read and a folder listed, so these are sampled.
    step = 1 if kind == "parquet" else max(1, len(units) // MIN_UNITS_COUNTED)
    counted = units[::step]
    total = sum(map_in_threads(lambda unit, of_unit: count_unit(unit, columns, of_unit), counted, remarks))
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
