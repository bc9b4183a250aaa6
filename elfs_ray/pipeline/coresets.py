"""Whose a coreset of a run directory is: the run's, or that of a selection made again from it.

A marker, of stage select or of such a selection, claims a table for each of its budgets: its first one, and
<first>-<budget> for every other. Two markers can have a name for the same table, as name=0.3 and budget=[0.1,0.3] do:
nothing is written to a table that another marker claims, or that holds files and no marker claims.
"""

from collections.abc import Sequence

from elfs_ray.config import ConfigError
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

SELECT = "select"


def tables_of(marker: Marker) -> list[str]:
    """The tables that a marker claims."""
    return schema.coreset_tables(marker.config["budget"], schema.CORESET if marker.stage == SELECT else marker.stage)


def owner_of(run_dir: RunDir, table: str) -> str | None:
    """The name of the marker that claims a table, complete or only started; None where none does."""
    pieces = table.split("-")
    for name in (SELECT, *("-".join(pieces[:end]) for end in range(2, len(pieces) + 1))):
        for marker in (run_dir.success_marker(name), run_dir.started_marker(name)):
            if marker is not None and table in tables_of(marker):
                return name
    return None


def refuse_foreign(run_dir: RunDir, tables: Sequence[str], owner: str, remedy: str) -> None:
    """Raise ConfigError for a table that is to be written by `owner` and is claimed by another marker."""
    for table in tables:
        found = owner_of(run_dir, table)
        if found in (None, owner):
            continue
        whose = "a coreset of the run itself"
        if found != SELECT:
            whose = f"a coreset that jobs/reselect.py wrote with name={str(found).removeprefix(f'{schema.CORESET}-')}"
        raise ConfigError(f"{run_dir.path(table)} is {whose}, which is not written over: {remedy}")


def unclaimed(run_dir: RunDir, tables: Sequence[str]) -> list[str]:
    """The tables that hold files and that no marker claims."""
    return [
        table
        for table in tables
        if filesystem.list_files(run_dir.path(table), recursive=True) and owner_of(run_dir, table) is None
    ]
