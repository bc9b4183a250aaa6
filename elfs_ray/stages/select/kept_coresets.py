"""List every coreset that a run has: its own, and those that were selected from it later, below coresets/."""

import re
from dataclasses import dataclass

from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir


@dataclass(frozen=True)
class KeptCoreset:
    """A coreset of a run.

    name: "coreset", "coreset-0.3" for a further budget; of a later selection "coresets/round2", and for its further
        budgets "coresets/round2/coreset-0.3".
    folder, table: the folder that holds its table, and the table's name.
    marker: that of its stage select.
    """

    name: str
    folder: RunDir
    table: str
    marker: Marker
    result: CoresetResult

    @property
    def is_later(self) -> bool:
        """Return whether it was selected from the finished run, into coresets/."""
        return self.name.startswith(f"{schema.CORESETS_DIR}/")

    @property
    def text_file(self) -> str:
        """Return the path of its list of uris."""
        return self.folder.path(schema.coreset_text_file(self.table))


def list_coresets(run_dir: RunDir) -> list[KeptCoreset]:
    """Return the coresets of a run, its own first, and later ones by name: round2 comes before round10.

    Raises FileNotFoundError for a run that has not selected yet.
    """
    run_dir.complete_marker(SelectResult.stage)
    kept = _coresets_of(run_dir, "")
    names = [info.base_name for info in filesystem.list_dirs(run_dir.path(schema.CORESETS_DIR))]
    for name in sorted(names, key=_natural_order):
        kept += _coresets_of(RunDir(run_dir.path(schema.CORESETS_DIR, name)), f"{schema.CORESETS_DIR}/{name}")
    return kept


def _coresets_of(folder: RunDir, prefix: str) -> list[KeptCoreset]:
    marker = folder.success_marker(SelectResult.stage)
    if marker is None:
        return []
    coresets = SelectResult.from_json(marker.result).coresets
    return [KeptCoreset(_name(prefix, table), folder, table, marker, coreset) for table, coreset in coresets.items()]


def _name(prefix: str, table: str) -> str:
    if not prefix:
        return table
    return prefix if table == schema.CORESET else f"{prefix}/{table}"


def _natural_order(name: str) -> list[tuple[int, str]]:
    # Numbers by their length, then digit by digit.
    return [(len(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
