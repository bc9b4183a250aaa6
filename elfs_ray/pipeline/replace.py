"""Find what must be replaced before a stage can rerun, and delete it so that a kill in between leaves no false result.

A table belongs to the stage whose marker claims it. Nothing else in the run directory is deleted.
"""

import dataclasses
from collections.abc import Iterator

from elfs_ray.config import Config
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.progress import say
from elfs_ray.stages.stage import Stage
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

MARKERS = (schema.SUCCESS_FILE, schema.STARTED_FILE)
HALF_REMOVED = "half removed"  # a key that no stage has: a marker with it never equals the one that a run wants
POOL_CHANGED = "the pool changed"  # its value where no other change was the reason


def marker_of(stage: Stage, run_dir: RunDir) -> Marker | None:
    """Return the marker of a stage that is complete or was started, else None."""
    return run_dir.success_marker(stage.name) or run_dir.started_marker(stage.name)


def has_written(marker: Marker, run_dir: RunDir) -> bool:
    """Return whether the stage with this marker has left anything of its work in the run directory."""
    for name in {marker.stage, *marker.outputs}:
        path = run_dir.path(name)
        files = [info.base_name for info in filesystem.list_files(path, recursive=True)]
        is_file = not files and filesystem.file_size(path) is not None
        if is_file or not all(file in MARKERS or filesystem.is_half_written(file) for file in files):
            return True
    return False


def other_writer(name: str, stage: Stage, run_dir: RunDir) -> Stage | None:
    """Return another stage whose marker claims a table of `stage`, else None.

    embed and copy can both write proxy_images/: copy does where the encoder is pretrained on the copies.
    """
    for other in STAGES:
        marker = marker_of(other, run_dir) if other is not stage else None
        if marker is not None and name in marker.outputs:
            return other
    return None


def describe_obstacles(stage: Stage, config: Config, run_dir: RunDir) -> Iterator[str]:
    """Yield a line for each folder of a stage that holds files for which the stage's own marker does not account."""
    present = marker_of(stage, run_dir)
    claimed = {stage.name, *present.outputs} if present else set()
    # Only tables: a single file such as report.html is overwritten as a whole, but a folder can keep old files among
    # the new ones, and a reader would take them for rows of the table.
    for name in dict.fromkeys((*stage.tables(config), stage.name)):
        if name in claimed or not filesystem.list_files(run_dir.path(name), recursive=True):
            continue
        other = other_writer(name, stage, run_dir)
        origin = f"was written by stage {other.name}" if other else "exists, but no marker says how it was made"
        yield f"{name}/ {origin}"


def replaced_names(stage: Stage, wanted: Marker, run_dir: RunDir) -> list[str]:
    """Return the names of the folders and files in the run directory that must be deleted before a stage reruns.

    These are the outputs that its present marker claims and those that it will write. If another stage has written one
    of the latter, all outputs of that stage are replaced too: it would be incomplete without that one.
    """
    names: dict[str, None] = {}
    for name in wanted.outputs:
        other = other_writer(name, stage, run_dir)
        if other is not None:
            marker = marker_of(other, run_dir)
            names |= dict.fromkeys((other.name, *(marker.outputs if marker else ())))
    present = marker_of(stage, run_dir)
    # A table that the marker claims may have been written by another stage since; then it is that stage's, and stays.
    claimed = [name for name in (present.outputs if present else ()) if not other_writer(name, stage, run_dir)]
    names |= dict.fromkeys((*claimed, *wanted.outputs, stage.name))
    return [name for name in names if filesystem.exists(run_dir.path(name))]


def remove_stage(stage: Stage, wanted: Marker, run_dir: RunDir, *, pool_changed: bool = False) -> None:
    """Delete what a stage replaces, except the marker of its own start, which its next start overwrites.

    pool_changed: whether nothing else is the reason, so that a run that was killed here goes on without on_change.
    """
    names = replaced_names(stage, wanted, run_dir)
    if names:  # none where an earlier stage of this run has replaced them all
        say(f"{stage.name:<9} reruns and replaces {', '.join(names)}")
    # The order matters, as a kill may come between any two lines. First every marker is made one that no config wants,
    # then the markers of success go, and only then the tables: half-deleted tables always belong to a marker that makes
    # the next run replace them, never to one that makes it skip or continue the stage.
    for other in STAGES:
        marker = marker_of(other, run_dir)
        if other.name in names and marker is not None:
            reason = POOL_CHANGED if pool_changed else True
            run_dir.mark_started(dataclasses.replace(marker, config={**marker.config, HALF_REMOVED: reason}))
            filesystem.delete(run_dir.path(other.name, schema.SUCCESS_FILE))
    for name in names:
        # The stage's own folder is last, and keeps its started marker for as long as any table is left.
        if name != stage.name:
            filesystem.delete(run_dir.path(name))
    run_dir.clear(stage.name)
