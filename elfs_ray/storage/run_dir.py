"""The run directory: where each table is, which stages are complete, and with which config they were made.

A stage writes the marker `<stage>/_STARTED.json` before its first row and `<stage>/_SUCCESS.json` after its last, both
atomically. The first prevents an unfinished stage from being resumed with another config; only the second makes its
tables readable to later stages.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.storage import filesystem, schema


class BadMarkerError(ValueError):
    """A marker that cannot be read. The message says which one, and what to do."""


@dataclass(frozen=True)
class Marker:
    """A record of how a stage's tables were made, written when the stage starts and again when it is complete.

    stage       the name of the stage
    config      the keys that decide its result
    inputs      the identity of each earlier stage whose tables it reads
    run_id      a random name for one making of the tables; a resumed stage keeps it
    input_runs  the run_id of each of those earlier stages
    outputs     the tables and files that it writes; once it is complete, the number of files and bytes of each
    follows     the run_ids that the stage had before the pool changed, each with the number of images listed then

    A complete stage adds its result (see elfs_ray/stages/stage.py), seconds and versions.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    result: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = ""
    input_runs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    follows: Mapping[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Return a hash of everything that decides the result: stages of one identity have the same tables."""
        # Sorted: a config read back from JSON may have its keys in another order.
        content = json.dumps({"stage": self.stage, "config": self.config, "inputs": self.inputs}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def is_made_as(self, wanted: "Marker") -> bool:
        """Return whether this has the config of `wanted` and was made from the very tables that exist now."""
        # The identity alone is not enough: tables that were replaced, as after damage, have the same identity but may
        # differ, because the images of the pool may have changed.
        return self.identity == wanted.identity and self.input_runs == wanted.input_runs

    def to_json(self) -> bytes:
        return (json.dumps({"identity": self.identity, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Marker":
        """Return the marker that `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(data)
            identity = fields.pop("identity")
            marker = cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it holds no marker: {type(error).__name__} {error}") from error
        if identity != marker.identity:
            raise ValueError(f"it was changed: it says identity {identity}, but its content has {marker.identity}")
        return marker


class RunDir:
    """A run directory at a local path or URI. It is cheap to pickle, so workers get it as an argument."""

    def __init__(self, uri: str | os.PathLike[str]):
        self.uri = filesystem.absolute(os.fspath(uri))

    def path(self, *parts: str) -> str:
        """Return the path of a table or file, such as path("clusters", "centroids.parquet")."""
        return filesystem.join(self.uri, *parts)

    def success_marker(self, stage: str) -> Marker | None:
        """Return the marker of a complete stage, else None. Raises BadMarkerError for one that cannot be read."""
        return self._read_marker(stage, schema.SUCCESS_FILE)

    def started_marker(self, stage: str) -> Marker | None:
        """Return the marker with which a stage was started, else None. Raises as `success_marker` does."""
        return self._read_marker(stage, schema.STARTED_FILE)

    def mark_started(self, marker: Marker) -> None:
        filesystem.write_bytes(self.path(marker.stage, schema.STARTED_FILE), marker.to_json())

    def mark_complete(self, marker: Marker) -> None:
        filesystem.write_bytes(self.path(marker.stage, schema.SUCCESS_FILE), marker.to_json())

    def unmark_complete(self, stage: str) -> None:
        """Delete the marker of a complete stage that goes on; its tables are complete again only at its end."""
        filesystem.delete(self.path(stage, schema.SUCCESS_FILE))

    def clear(self, stage: str) -> None:
        """Delete everything in a stage's folder except the marker of its start, which still claims its tables."""
        # The success marker first: a kill may then leave files without a marker, which are never read, but never a
        # marker without its files.
        filesystem.delete(self.path(stage, schema.SUCCESS_FILE))
        for info in (*filesystem.list_dirs(self.path(stage)), *filesystem.list_files(self.path(stage))):
            if info.base_name != schema.STARTED_FILE:
                filesystem.delete(self.path(stage, info.base_name))

    def complete_marker(self, stage: str) -> Marker:
        """Return the marker of a complete stage. Raises FileNotFoundError, naming the stage, if it is not complete."""
        marker = self.success_marker(stage)
        if marker is None:
            raise FileNotFoundError(
                f"stage '{stage}' is not complete in {self.uri}: run it first (the pipeline runs all stages in order)"
            )
        return marker

    def identity(self, stage: str) -> str:
        """Return the identity of a complete stage's result. Raises FileNotFoundError as `complete_marker` does."""
        marker = self.complete_marker(stage)
        # The same config and inputs give other tables once the pool has changed.
        return f"{marker.identity}-{marker.run_id}" if marker.follows else marker.identity

    def measure(self, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """Return the number of files and bytes of each table (of its Parquet files) or file, from listings."""
        return {name: self._measure(name) for name in names}

    def damage(self, stage: str) -> tuple[str, ...]:
        """Return a line for each table or file of a complete stage whose size is not the one in its marker."""
        marker = self.success_marker(stage)
        written = marker.outputs if marker else {}
        present = self.measure(written)
        return tuple(
            f"{name} has {present[name]['files']} files of {present[name]['bytes']:,} bytes, "
            f"{size['files']} of {size['bytes']:,} were written"
            for name, size in written.items()
            if present[name] != size
        )

    def _measure(self, name: str) -> dict[str, int]:
        size = filesystem.file_size(self.path(name))
        if size is not None:
            return {"files": 1, "bytes": size}
        files = filesystem.list_files(self.path(name), recursive=True)
        sizes = [info.size for info in files if info.base_name.endswith(".parquet")]
        return {"files": len(sizes), "bytes": sum(sizes)}

    def first_choice(self, *parts: str, choose: Callable[[], str]) -> str:
        """Return what the run chose earlier; otherwise choose, and write it down in the file `parts`.

        For a choice that depends on the cluster and decides the result: a resumed run may see another cluster.
        """
        path = self.path(*parts)
        if filesystem.exists(path):
            return filesystem.read_bytes(path).decode()
        choice = choose()
        filesystem.write_bytes(path, choice.encode())
        return choice

    def table_files(self, *parts: str) -> list[str]:
        """Return the paths of a table's Parquet files, sorted by name; none if the table has no rows."""
        root = self.path(*parts)
        files = filesystem.list_files(root)
        # Markers and temporary files of running writers lie in the same folder.
        return [filesystem.join(root, info.base_name) for info in files if info.base_name.endswith(".parquet")]

    def counted_files(self, *parts: str) -> list[tuple[str, int]]:
        """Return `table_files` with the number of rows of each, from its footer."""
        paths = self.table_files(*parts)
        return list(zip(paths, filesystem.map_files(filesystem.num_rows, paths), strict=True))

    def read_table(self, *parts: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield a table file by file, sorted by name. Memory: one file."""
        for path in self.table_files(*parts):
            yield filesystem.read_table(path, columns)

    def read_column(self, *parts: str, column: str) -> np.ndarray:
        """Return a numeric column of a whole table, (n,), in the order of the files. Memory: the column, twice."""
        chunks = [table[column].to_numpy() for table in self.read_table(*parts, columns=[column])]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)

    def read_rows(self, table: str, sample_ids: np.ndarray, columns: list[str]) -> pa.Table:
        """Return the rows with these sample ids, in the same order, from a table that lies in range files.

        Only files that hold such rows are read. An id may occur more than once. Raises KeyError for ids that the table
        lacks.
        """
        unique_ids = np.unique(np.asarray(sample_ids, dtype=np.int64))
        names = [schema.SAMPLE_ID, *columns]
        files = self.table_files(table)
        parts = []
        for path in files:
            first, last = schema.parse_range_file(path)
            low, high = np.searchsorted(unique_ids, [first, last + 1])
            if low < high:
                rows = filesystem.read_table(path, names)
                is_wanted = np.isin(rows[schema.SAMPLE_ID].to_numpy(), unique_ids[low:high])
                parts.append(rows.filter(is_wanted))
        if not parts and files:
            # No ids at all: no rows, but with the columns of the table.
            parts = [filesystem.read_schema(files[0]).empty_table().select(names)]
        rows = pa.concat_tables(parts) if parts else pa.table({schema.SAMPLE_ID: pa.array([], pa.int64())})
        row_ids = rows[schema.SAMPLE_ID].to_numpy()
        missing = np.setdiff1d(unique_ids, row_ids)
        if len(missing):
            raise KeyError(f"{self.path(table)} has no sample_id {missing[:5].tolist()} ({len(missing)} missing)")
        # Rows come in any order within a file, so each id is looked up in the sorted ids.
        order = np.argsort(row_ids)
        return rows.take(order[np.searchsorted(row_ids[order], sample_ids)])

    def read_range(
        self, *parts: str, first: int, last: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yield the rows with first <= sample_id <= last of a table that lies in range files, a table for each file."""
        for path in self.table_files(*parts):
            file_first, file_last = schema.parse_range_file(path)
            if file_first <= last and file_last >= first:
                yield filesystem.read_range(path, schema.SAMPLE_ID, first, last, columns)

    def _read_marker(self, stage: str, name: str) -> Marker | None:
        path = self.path(stage, name)
        try:
            return Marker.from_json(filesystem.read_bytes(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            # Without the success marker a stage resumes by its started marker; without that one, nothing says with
            # which config its tables were made.
            what_to_do = (
                "delete it to resume the stage"
                if name == schema.SUCCESS_FILE
                else f"delete {self.path(stage)} and use on_change=rerun to run stage {stage} from the start"
            )
            raise BadMarkerError(f"{path} cannot be read: {error}. Restore it, or {what_to_do}.") from error


class Overlay(RunDir):
    """A run directory that has some tables and stages of its own, and reads all others from another run directory.

    prefixes: how the names of the former begin, such as "coreset" for coreset/ and coreset-0.3/. A stage that writes
    only such names leaves the other run directory unchanged.
    """

    def __init__(self, uri: str | os.PathLike[str], base: RunDir, prefixes: tuple[str, ...]):
        super().__init__(uri)
        self.base, self.prefixes = base, prefixes

    def path(self, *parts: str) -> str:
        """Return the path of a table or file here or, for any other name, in the other run directory."""
        is_here = parts and parts[0].startswith(self.prefixes)
        return super().path(*parts) if is_here else self.base.path(*parts)
