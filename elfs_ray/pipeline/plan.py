"""What a run would do with each stage, and every check that can be made before it does."""

import json
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from elfs_ray.config import Config, ConfigError, check_against_pool
from elfs_ray.pipeline.replace import describe_obstacles, replaced_names
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.pool.listing import PoolColumns, count_unit, find_units
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import BadMarkerError, Marker, RunDir

MIN_UNITS_COUNTED = 64
UNIT_NOUNS = {"folder": "folder", "parquet": "Parquet file", "webdataset": "tar"}


@dataclass(frozen=True)
class PoolCount:
    """The samples of a pool; `basis` says what they were estimated from, and is empty where they were counted."""

    num_samples: int
    basis: str = ""

    @property
    def is_exact(self) -> bool:
        return not self.basis


@dataclass(frozen=True)
class PlannedStage:
    """What a run would do with a stage: 'done', 'continue', 'run', or 'rerun' because of `differences`.

    'rerun' replaces what was made with another config, from other inputs, by nobody knows what, or was damaged since.
    `marker` is the one that the stage has, or starts with.
    """

    stage: Stage
    action: str
    marker: Marker
    differences: tuple[str, ...] = ()


def check(config: Config, run_dir: RunDir, pool: PoolCount | None = None) -> list[PlannedStage]:
    """Check all that can be known before work starts; return the plan. Raises ConfigError.

    pool: its size, where it is not there yet to be counted.
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
    pool = filesystem.absolute(config.pool.uri)
    if f"{run_dir.uri}/".startswith(f"{pool}/"):
        raise ConfigError(
            f"run_dir={config.run_dir} is in the pool, pool.uri={config.pool.uri}: its tables would be listed as "
            "images the next time. Give a folder that is elsewhere"
        )


def make_plan(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """Return what a run would do with each stage. Raises ConfigError for a marker that cannot be read."""
    plan: list[PlannedStage] = []
    markers: dict[str, Marker] = {}
    for stage in stages_of(config):
        planned = plan_stage(stage, config, run_dir, markers)
        markers[stage.name] = planned.marker
        plan.append(planned)
    return plan


def plan_stage(stage: Stage, config: Config, run_dir: RunDir, markers: Mapping[str, Marker]) -> PlannedStage:
    """Return what a run would do with one stage; `markers` are those of the stages before it."""
    wanted = wanted_marker(stage, config, markers)
    try:
        success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
        obstacles = tuple(describe_obstacles(stage, config, run_dir))
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error
    present = success or started
    if present is None:
        return PlannedStage(stage, "rerun" if obstacles else "run", wanted, obstacles)
    changes = () if present.is_made_as(wanted) else _changes(present, wanted)
    differences = (*changes, *obstacles, *run_dir.damage(stage.name))
    if differences:
        return PlannedStage(stage, "rerun", wanted, differences)
    return PlannedStage(stage, "done" if success else "continue", present)


def wanted_marker(stage: Stage, config: Config, markers: Mapping[str, Marker]) -> Marker:
    """Return the marker that a stage would start with; `markers` are those of the stages before it."""
    inputs = {name: markers[name] for name in stage.inputs(config)}
    return Marker(
        stage.name,
        stage.deciding_config(config),
        {name: marker.identity for name, marker in inputs.items()},
        run_id=secrets.token_hex(8),
        input_runs={name: marker.run_id for name, marker in inputs.items()},
        outputs={name: {} for name in stage.outputs(config)},
    )


def _check_size(config: Config, run_dir: RunDir, plan: list[PlannedStage], pool: PoolCount | None = None) -> None:
    """Check the config against what complete stages have counted, else against the pool where it can be counted."""
    for planned in plan:
        if planned.action == "done":
            planned.stage.check_result(config, run_dir)
    if not is_done(IndexResult, plan):
        pool = pool or count_pool(config, run_dir, plan)
        if pool.is_exact:
            check_against_pool(config, pool.num_samples)


def is_done(result: type[Result], plan: list[PlannedStage]) -> bool:
    """Return whether the stage with this result is complete, with the very config of the plan."""
    return any(planned.stage.result is result and planned.action == "done" for planned in plan)


def count_pool(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> PoolCount:
    """The samples in the pool: from index/ where it is complete, else from the listing.

    Of 128 tars or folders and more, 64 or more are counted and the others taken to hold as many.
    Memory: of tars and of folders in a bucket the listings of 16 at a time (see pool/listing.py), of others nothing.
    """
    if is_done(IndexResult, plan):
        return PoolCount(IndexResult.read(run_dir).rows)
    units = find_units(config.pool.uri, config.pool.format)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    kind = units[0].format
    step = 1 if kind == "parquet" else max(1, len(units) // MIN_UNITS_COUNTED)
    counted = units[::step]
    with ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(lambda unit: count_unit(unit, columns), counted))
    if step == 1:
        return PoolCount(total)
    basis = f"{len(counted):,} of its {len(units):,} {UNIT_NOUNS[kind]}s"
    return PoolCount(round(total * len(units) / len(counted)), basis)


def _changes(present: Marker, wanted: Marker) -> tuple[str, ...]:
    """Return what makes two markers of one stage differ, at least one line, by the JSON that is hashed."""
    lines = []
    for key in sorted(set(present.config) | set(wanted.config)):
        before, now = (
            json.dumps(marker.config[key], sort_keys=True) if key in marker.config else "none"
            for marker in (present, wanted)
        )
        if before != now:
            lines.append(f"{key}: {before} there, {now} now")
    names = dict.fromkeys((*wanted.inputs, *present.inputs))
    changed = [name for name in names if _input(present, name) != _input(wanted, name)]
    return tuple(lines) or (f"made from another {', '.join(changed)}",)


def _input(marker: Marker, name: str) -> tuple[str | None, str | None]:
    return marker.inputs.get(name), marker.input_runs.get(name)


def refuse_differences(plan: list[PlannedStage], config: Config, run_dir: RunDir) -> None:
    """Raise ConfigError where stages would be replaced and config.on_change does not say so."""
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
