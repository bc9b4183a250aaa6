"""The order of the stages: skip what is complete, refuse what was made with another config, time each.

    index ──► embed ──► cluster ──► train ──► select ──► report
    index ──► copy ──► pretrain ──► embed ──► ...               with an encoder that is trained on the pool itself

No science here: a stage is a function of (config, run_dir) that reads tables and writes its own.
"""

import contextlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import chain
from typing import Any

from elfs_ray.config import Config, ConfigError
from elfs_ray.pipeline.plan import (
    PlannedStage,
    check,
    check_counted,
    check_network,
    make_plan,
    other_writer,
    plan_stage,
    refuse_differences,
)
from elfs_ray.pipeline.stages import EVALUATE, Stage, stages_of
from elfs_ray.pool.listing import find_units
from elfs_ray.runtime.progress import count, format_duration, listen, say
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import TABLES, Marker, RunDir
from elfs_ray.storage.run_lock import RunDirInUse, RunLock

RECORDED_VERSIONS = ("elfs-ray", "ray", "torch", "torchvision", "pyarrow", "numpy", "pillow")
WORKERS = "workers"


def run(config: Config) -> RunDir:
    """Run every stage up to config.until that is not complete.

    Raises ConfigError, before any work, for a config that cannot be run or that differs from the run directory's.
    """
    run_dir = RunDir(config.run_dir)
    plan = check(config, run_dir)
    if all(planned.action == "done" for planned in plan):
        say(f"nothing to do: every stage is complete in {run_dir.uri}")
        return run_dir

    _connect(config)
    _ask(plan, config, run_dir)
    with locked(run_dir) as lock:
        # Once more: until now another driver may have had the run directory.
        plan = make_plan(config, run_dir)
        refuse_differences(plan, config, run_dir)
        for planned in plan:
            lock.check()
            if planned.action == "done":
                say(f"{planned.stage.name:<9} complete, skipped")
                continue
            _run_stage(planned, config, run_dir)
            check_counted(config, run_dir, planned.stage.name)
    return run_dir


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[RunLock]:
    """The run directory for this driver alone, without the half-written files of killed ones. Raises ConfigError."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(RunLock(run_dir.uri, say))
        except RunDirInUse as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(
                f"run_dir={run_dir.uri} cannot be written: {error}. Mend that, or give another run_dir."
            ) from error
        num_deleted = filesystem.delete_half_written(run_dir.uri)
        if num_deleted:
            say(f"{count(num_deleted, 'half-written file')} of a killed run removed")
        yield lock


def evaluate(config: Config) -> Mapping[str, Any]:
    """Train on the coreset and on random samples with true labels, beside each other; the figures of stage evaluate.

    Runs what is not complete of the pipeline first. Raises ConfigError as `run` does.
    """
    if config.evaluate.test_uri is None or config.pool.label is None:
        raise ConfigError("evaluate needs true labels: give evaluate.test_uri=... and pool.label=...")
    check_network("evaluate.network", config.evaluate.network)
    try:
        find_units(config.evaluate.test_uri, config.pool.format)
    except (ValueError, OSError) as error:
        raise ConfigError(f"evaluate.test_uri: {error}") from error
    run_dir = run(config)
    planned = plan_stage(
        EVALUATE, config, run_dir, {stage.name: run_dir.identity(stage.name) for stage in stages_of(config)}
    )
    refuse_differences([planned], config, run_dir)
    if planned.action != "done":
        _connect(config)
        with locked(run_dir):
            _run_stage(planned, config, run_dir)
    return run_dir.figures(EVALUATE.name)


def _connect(config: Config) -> None:
    from elfs_ray.runtime.cluster import connect
    from elfs_ray.runtime.metrics import report_progress

    try:
        connect(config.ray_address, show_worker_logs=config.ray_logs)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at ray_address={config.ray_address}: {error}") from error
    listen(report_progress)


def _ask(plan: list[PlannedStage], config: Config, run_dir: RunDir) -> None:
    """Say what each stage that is to run will ask of the cluster. Raises ConfigError for what it cannot have."""
    from elfs_ray.pipeline.resources import (
        advice_on,
        check_request,
        check_same_workers,
        describe_shortage,
        requests_of,
    )
    from elfs_ray.runtime.cluster import devices_of_cluster

    devices = devices_of_cluster()
    say(f"devices   {devices.describe()}")
    names = [planned.stage.name for planned in plan if planned.action != "done"]
    requests = {name: requests_of(name, config, devices) for name in names}
    for request in chain.from_iterable(requests.values()):
        check_request(request, devices)
    for name, own in requests.items():
        if own:
            say(f"{name:<9} will ask for {', '.join(request.describe() for request in own)}")
        for shortage in filter(None, (describe_shortage(request, devices) for request in own)):
            say(f"{name:<9} will wait for nodes: {shortage}")
        for line in advice_on(name, config, devices):
            say(f"{name:<9} {line}")
    for planned in plan:
        workers = _what_was_lost(planned, run_dir).get(WORKERS)
        if workers:
            (request,) = requests[planned.stage.name]
            check_same_workers(request, workers)


def _run_stage(planned: PlannedStage, config: Config, run_dir: RunDir) -> None:
    stage, marker = planned.stage, planned.marker
    lost = _what_was_lost(planned, run_dir)
    started = Marker(marker.stage, marker.config, marker.inputs, lost)
    if planned.action == "mend":
        run_dir.mark_started(started)  # before anything is removed, as it knows what has to come back
    if planned.needs_consent:
        _remove_tables(planned, run_dir)
    elif planned.action == "continue":
        say(f"{stage.name:<9} started before, goes on")
    # Started before anything is written: what an unfinished stage leaves is never continued with another config.
    run_dir.mark_started(started)
    start_s = time.time()
    try:
        figures = dict(stage.function()(config, run_dir))
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"stopped in stage {stage.name}, what it has saved and every stage before it are in {run_dir.uri}"
        )
        raise
    figures["seconds"] = round(time.time() - start_s, 3)
    figures["versions"] = {name: version(name) for name in RECORDED_VERSIONS} | {"python": platform.python_version()}
    figures[TABLES] = run_dir.measure(stage.outputs(marker.config))
    if lost and stage.tables and lost[TABLES] != figures[TABLES]:
        raise RuntimeError(_refuse_other_tables(planned, run_dir, lost[TABLES], figures[TABLES]))
    run_dir.mark_complete(Marker(marker.stage, marker.config, marker.inputs, figures))
    say(f"{stage.name:<9} complete in {format_duration(figures['seconds'])}")


def _what_was_lost(planned: PlannedStage, run_dir: RunDir) -> Mapping[str, Any]:
    """The sizes that the tables of a damaged stage had, which they have to have again: later stages read them.

    And the numbers of workers that made them, where each epoch has told its own. Empty where nothing was lost.
    """
    stage = planned.stage.name
    if planned.action == "continue":
        started = run_dir.started_marker(stage)
        return started.figures if started else {}
    found = run_dir.success_marker(stage) if planned.action == "mend" else None
    if found is None or TABLES not in found.figures:
        return {}
    workers = {epoch[WORKERS] for epoch in found.figures.get("history", ()) if WORKERS in epoch}
    return {TABLES: found.figures[TABLES], **({WORKERS: sorted(workers)} if stage == "train" else {})}


def _refuse_other_tables(
    planned: PlannedStage, run_dir: RunDir, lost: Mapping[str, Any], made: Mapping[str, Any]
) -> str:
    """Remove what was made again and is not what was lost, so that the right command can try once more; the message."""
    stage = planned.stage
    tables = ", ".join(run_dir.path(name) for name in lost)
    if stage.mends:
        remedy = f"delete {tables}, all of which is then made again by the same command"
    else:
        _clear(stage, stage.outputs(planned.marker.config), run_dir)
        remedy = "what was made is removed; the same command tries once more"
    return (
        f"the tables that stage {stage.name} made again are not those that were lost ({made}, they were {lost}): the "
        f"pool, the software or the devices are others, and what follows was made from those. Restore what is another, "
        f"and {remedy}. Or give another run_dir."
    )


def _remove_tables(planned: PlannedStage, run_dir: RunDir) -> None:
    stage = planned.stage
    if planned.action == "mend" and stage.mends:
        say(f"{stage.name:<9} damaged: what is missing of its tables is made again")
        filesystem.delete(run_dir.path(stage.name, schema.SUCCESS_FILE))
        return
    other = other_writer(stage, run_dir)
    if other is not None:
        _remove_stage(other, run_dir, "made with another config")
        filesystem.delete(run_dir.path(other.name))
    why = "damaged" if planned.action == "mend" else "made with another config"
    _remove_stage(stage, run_dir, why, planned.marker.config)


def _remove_stage(stage: Stage, run_dir: RunDir, why: str, wanted: Mapping[str, Any] | None = None) -> None:
    """Remove what a stage has made, but for the marker of its start, which the next start replaces.

    wanted: the config of the next start, whose tables may be there without a marker.
    """
    found = run_dir.success_marker(stage.name) or run_dir.started_marker(stage.name)
    configs = [config for config in (found.config if found else None, wanted) if config] or [{"budget": None}]
    outputs = dict.fromkeys(name for config in configs for name in stage.outputs(config))
    if not any(filesystem.exists(run_dir.path(name)) for name in (*outputs, stage.name)):
        return  # removed with the tables of another writer
    made = stage.all_tables(configs[0])
    made += [
        name for name in stage.all_tables(configs[-1]) if name not in made and filesystem.exists(run_dir.path(name))
    ]
    say(f"{stage.name:<9} {why}: its tables {', '.join(made) or 'and files'} are replaced")
    _clear(stage, outputs, run_dir)


def _clear(stage: Stage, outputs: Iterable[str], run_dir: RunDir) -> None:
    """Delete the outputs of a stage, and what its folder holds."""
    filesystem.delete(run_dir.path(stage.name, schema.SUCCESS_FILE))  # tables without it are never read
    for name in outputs:
        filesystem.delete(run_dir.path(name))
    run_dir.clear(stage.name)
