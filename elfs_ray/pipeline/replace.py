"""What is in the way of a stage that is to be made again, and its removal."""

import dataclasses
from collections.abc import Iterator

from elfs_ray.config import Config
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.progress import say
from elfs_ray.stages.stage import Stage
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

HALF_REMOVED = "half removed"  # in the config of a marker: no stage has this key


def marker_of(stage: Stage, run_dir: RunDir) -> Marker | None:
    """Return the marker of a stage that is complete or was started."""
    return run_dir.success_marker(stage.name) or run_dir.started_marker(stage.name)


def other_writer(name: str, stage: Stage, run_dir: RunDir) -> Stage | None:
    """Return the stage whose marker claims a table of `stage`: embed and copy both write proxy_images/."""
    for other in STAGES:
        marker = marker_of(other, run_dir) if other is not stage else None
        if marker is not None and name in marker.outputs:
            return other
    return None


def describe_obstacles(stage: Stage, config: Config, run_dir: RunDir) -> Iterator[str]:
    """Yield a line for each folder of a stage that holds files which its own marker does not account for."""
    present = marker_of(stage, run_dir)
    claimed = {stage.name, *present.outputs} if present else set()
    # A file, as report.html, is written whole whatever was there: only a folder can hold what is left over.
    for name in dict.fromkeys((*stage.tables(config), stage.name)):
        if name in claimed or not filesystem.list_files(run_dir.path(name), recursive=True):
            continue
        other = other_writer(name, stage, run_dir)
        origin = f"was written by stage {other.name}" if other else "is there, no marker says how it was made"
        yield f"{name}/ {origin}"


def replaced_names(stage: Stage, wanted: Marker, run_dir: RunDir) -> list[str]:
    """Return the folders and files that make way for a stage, by their names in the run directory.

    They are what its marker claims and what it is to write, with all of another stage that has written some of that.
    """
    names: dict[str, None] = {}
    for name in wanted.outputs:
        other = other_writer(name, stage, run_dir)
        if other is not None:
            marker = marker_of(other, run_dir)
            names |= dict.fromkeys((other.name, *(marker.outputs if marker else ())))
    present = marker_of(stage, run_dir)
    # What the marker claims and the stage no longer writes may be another's by now.
    claimed = [name for name in (present.outputs if present else ()) if not other_writer(name, stage, run_dir)]
    names |= dict.fromkeys((*claimed, *wanted.outputs, stage.name))
    return [name for name in names if filesystem.exists(run_dir.path(name))]


def remove_stage(stage: Stage, wanted: Marker, run_dir: RunDir) -> None:
    """Remove what makes way for a stage, but for the marker of its own start, which the next start replaces."""
    names = replaced_names(stage, wanted, run_dir)
    say(f"{stage.name:<9} is made again: {', '.join(names)} are replaced")
    for other in STAGES:
        marker = marker_of(other, run_dir)
        if other.name in names and marker is not None:
            # Killed from here on, nobody may take what is left for a result, or for one that was only begun.
            run_dir.mark_started(dataclasses.replace(marker, config={**marker.config, HALF_REMOVED: True}))
            filesystem.delete(run_dir.path(other.name, schema.SUCCESS_FILE))
    for name in names:
        if name != stage.name:
            filesystem.delete(run_dir.path(name))
    run_dir.clear(stage.name)
