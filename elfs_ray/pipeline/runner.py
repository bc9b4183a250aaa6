"""Run the stages in order, as plan.py has decided for each: skip, resume, run or replace it.

A stage is a function of (config, run_dir) that reads tables of earlier stages and writes its own.
"""

import contextlib
import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version

from elfs_ray.config import Config, ConfigError
from elfs_ray.pipeline.connection import connect_if_needed
from elfs_ray.pipeline.estimates import estimate_stages, may_take_days, warn_of_days
from elfs_ray.pipeline.plan import PlannedStage, check, check_listed, make_plan, refuse_differences
from elfs_ray.pipeline.replace import remove_stage
from elfs_ray.pipeline.settle import settle, settle_runtime
from elfs_ray.runtime.progress import count, format_duration, say
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Stage
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.storage.run_lock import RunDirInUse, RunLock

# Those of them that are installed.
RECORDED_VERSIONS = ("elfs-ray", "ray", "torch", "torchvision", "openvino", "pyarrow", "numpy", "pillow")


def run(config: Config) -> RunDir:
    """Run every stage that is not complete, up to config.until if that is set; return the run directory.

    Raises ConfigError, before any work, for a config that cannot be run or that differs from the run directory's.
    """
    run_dir = RunDir(config.run_dir)
    config, decisions = settle(config, run_dir)
    # Planned before Ray starts and without the lock: a bad config is refused, and a complete run is done, in a second.
    plan = check(config, run_dir)
    _announce_changes(plan)
    if all(planned.action == "done" for planned in plan):
        say(f"nothing to do: every stage is complete in {run_dir.uri}")
        return run_dir

    for line in decisions:
        say(line)
    connect_if_needed(config, run_dir, _to_run(plan))
    config = _settle_runtime(config, plan)
    _announce_requests(plan, config)
    with locked(run_dir) as lock:
        # Planned again: until this one got the lock, another driver may have completed, started or replaced stages.
        plan = make_plan(config, run_dir, plan[0].pool_change)
        refuse_differences(plan, config, run_dir)
        for position in range(len(plan)):
            planned = plan[position]
            # A lost lock interrupts the main thread; a run in another thread learns of it only here.
            lock.check()
            if planned.action == "done":
                say(f"{planned.stage.name:<9} complete, skipped")
                continue
            run_stage(planned, config, run_dir)
            # A budget that fits the listing may be too large once embed has rejected images. Later stages take hours.
            planned.stage.check_result(config, run_dir)
            if planned.stage.result is IndexResult:
                # Planned again by what was listed: the pool may have changed once more since it was compared.
                plan = make_plan(config, run_dir)
                check_listed(config, run_dir, plan)
                connect_if_needed(config, run_dir, _to_run(plan))
                _warn_of_days(config, run_dir, plan)
    return run_dir


def _announce_changes(plan: list[PlannedStage]) -> None:
    """Print how the pool has changed, and what each stage does because of it."""
    for planned in plan:
        if planned.pool_change is not None or planned.action in ("extend", "update"):
            say(f"{planned.stage.name:<9} {'; '.join([planned.action, *planned.differences])}")


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[RunLock]:
    """Lock a run directory for this driver, and delete the half-written files of killed ones.

    Raises ConfigError while another driver has the lock, and for a run directory that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(RunLock(run_dir.uri, say))
        except RunDirInUse as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(
                f"run_dir={run_dir.uri} cannot be written: {error}. Fix the cause, or give another run_dir."
            ) from error
        # Only now: until the lock is held, such a file may be one that another driver is writing.
        num_deleted = filesystem.delete_half_written(run_dir.uri)
        if num_deleted:
            say(f"deleted {count(num_deleted, 'half-written file')} of a killed run")
        yield lock


def _to_run(plan: list[PlannedStage]) -> list[Stage]:
    return [planned.stage for planned in plan if planned.action != "done"]


def _settle_runtime(config: Config, plan: list[PlannedStage]) -> Config:
    """Return the config with what computes the encoder, and say what does."""
    from elfs_ray.runtime.cluster import devices_of_cluster

    config, decisions = settle_runtime(config, plan, devices_of_cluster())
    for line in decisions:
        say(line)
    return config


def _announce_requests(plan: list[PlannedStage], config: Config) -> None:
    """Print what each stage that will run asks of the cluster. Raises ConfigError for what the cluster cannot have."""
    from elfs_ray.runtime.cluster import devices_of_cluster
    from elfs_ray.runtime.resources import check_request, describe_shortage

    devices = devices_of_cluster()
    say(f"devices   {devices.describe()}")
    stages = _to_run(plan)
    of_stage = {stage.name: stage.devices(config, devices) for stage in stages}
    requests = {stage.name: stage.requests(config, of_stage[stage.name]) for stage in stages}
    # All are checked before any is printed: an error comes alone, rather than after promises for earlier stages.
    for stage in stages:
        for request in requests[stage.name]:
            check_request(request, of_stage[stage.name])
    for stage in stages:
        if requests[stage.name]:
            say(f"{stage.name:<9} will request {', '.join(request.describe() for request in requests[stage.name])}")
        shortages = (describe_shortage(request, of_stage[stage.name]) for request in requests[stage.name])
        for shortage in filter(None, shortages):
            say(f"{stage.name:<9} will wait for nodes: {shortage}")
        for line in stage.advice(config, of_stage[stage.name]):
            say(f"{stage.name:<9} {line}")


def _warn_of_days(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> None:
    """Say that a run would take more than a day, before its long stages start."""
    from elfs_ray.runtime.cluster import devices_of_cluster

    num_samples, devices = IndexResult.read(run_dir).rows, devices_of_cluster()
    if may_take_days(config, plan, num_samples, devices):
        say("time      may be long: measuring for some seconds")
        for line in warn_of_days(estimate_stages(config, run_dir, plan, num_samples, devices)[1]):
            say(f"time      {line}")


def _watch(stage: Stage, config: Config) -> AbstractContextManager[None]:
    """Return a context in which it is said if nodes are lost that the stage needs."""
    from elfs_ray.runtime.cluster import devices_of_cluster
    from elfs_ray.runtime.lost_nodes import tell_of_lost_nodes

    # On the stage's own nodes, as the looks are: these happen while the stage runs.
    before = stage.devices(config, devices_of_cluster())
    requests = stage.requests(config, before)
    return (
        tell_of_lost_nodes(stage.name, requests, before, devices_of_cluster) if requests else contextlib.nullcontext()
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def run_stage(planned: PlannedStage, config: Config, run_dir: RunDir) -> None:
    """Run one stage of a plan, with its markers before and after. The caller holds the lock."""
    stage, marker = planned.stage, planned.marker
    if planned.action in ("rerun", "update"):
        remove_stage(stage, marker, run_dir, pool_changed=planned.action == "update")
    elif planned.action == "continue":
        say(f"{stage.name:<9} was started before, resumes")
    # Before the stage writes anything, so that its unfinished tables are never continued with another config.
    run_dir.mark_started(marker)
    # Only now: a stage without either marker would be replaced.
    run_dir.unmark_complete(stage.name)
    start_s = time.time()
    try:
        with _watch(stage, config):
            result = stage.run(config, run_dir)
    except KeyboardInterrupt as stop:
        # The command line prints this note; see cli.py.
        stop.add_note(f"stopped in stage {stage.name}; its progress and all earlier stages are kept in {run_dir.uri}")
        raise
    complete = dataclasses.replace(
        marker,
        result=result.to_json(),
        # Sizes, by which later runs notice files that were lost or cut short.
        outputs=run_dir.measure(marker.outputs),
        seconds=round(time.time() - start_s, 3),
        versions=_versions(),
    )
    # Last of all: only this makes the tables readable to later stages.
    run_dir.mark_complete(complete)
    say(f"{stage.name:<9} complete in {format_duration(complete.seconds)}")
