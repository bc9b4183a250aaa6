"""The run directory: where each table lies, which stages are complete, and with which config.

`<stage>/_STARTED.json` is written before a stage's first row and `<stage>/_SUCCESS.json` after its last, both
atomically. The first keeps a half-finished stage from being continued with another config; only the second makes its
tables readable to later stages.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.storage import filesystem, schema


class BadMarkerError(ValueError):
    """A marker that cannot be read; the message says which, and what to do."""


@dataclass(frozen=True)
class Marker:
    """What a stage leaves when it starts and when it is complete.

    `config` holds the keys that decide the stage's result; `inputs` the identity of each earlier stage that it read.
    `run_id` is a random name of this making of the tables, which a half-finished stage keeps when it goes on;
    `input_runs` holds those of the inputs. `outputs` are the tables and files that the stage writes: once it is
    complete, each with its number of files and bytes. Identity and run aside, a complete stage adds its result (see
    elfs_ray/stages/stage.py), seconds and versions.
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

    @property
    def identity(self) -> str:
        """A hash of all that decides the result: two stages with the same identity hold the same tables."""
        content = json.dumps({"stage": self.stage, "config": self.config, "inputs": self.inputs}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def is_made_as(self, wanted: "Marker") -> bool:
        """Whether it has the config of `wanted` and was made from the very tables that are there now.

        Tables that were made again, as after damage, have the same identity and may differ: the pool may have changed.
        """
        return self.identity == wanted.identity and self.input_runs == wanted.input_runs

    def to_json(self) -> bytes:
        return (json.dumps({"identity": self.identity, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Marker":
        """Raises ValueError for anything that `to_json` did not write."""
        try:
            fields = json.loads(data)
            identity = fields.pop("identity")
            marker = cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it holds no marker: {type(error).__name__} {error}") from error
        if identity != marker.identity:
            raise ValueError(f"it was changed: its content is that of {marker.identity}, it says {identity}")
        return marker


class RunDir:
    """A run directory at a local path or URI. Cheap to pickle: workers get one."""

    def __init__(self, uri: str | os.PathLike[str]):
        self.uri = filesystem.absolute(os.fspath(uri))

    def path(self, *parts: str) -> str:
        return filesystem.join(self.uri, *parts)

    def success_marker(self, stage: str) -> Marker | None:
        return self._read_marker(stage, schema.SUCCESS_FILE)

    def started_marker(self, stage: str) -> Marker | None:
        return self._read_marker(stage, schema.STARTED_FILE)

    def mark_started(self, marker: Marker) -> None:
        filesystem.write_bytes(self.path(marker.stage, schema.STARTED_FILE), marker.to_json())

    def mark_complete(self, marker: Marker) -> None:
        filesystem.write_bytes(self.path(marker.stage, schema.SUCCESS_FILE), marker.to_json())

    def clear(self, stage: str) -> None:
        """Delete what a stage's folder holds, but for the marker of its start: that still says whose its tables are."""
        # The other marker first: tables without one are never read, one without tables would be.
        filesystem.delete(self.path(stage, schema.SUCCESS_FILE))
        for info in (*filesystem.list_dirs(self.path(stage)), *filesystem.list_files(self.path(stage))):
            if info.base_name != schema.STARTED_FILE:
                filesystem.delete(self.path(stage, info.base_name))

    def complete_marker(self, stage: str) -> Marker:
        """Return the marker of a complete stage. Raises FileNotFoundError, naming the stage, if it is not complete."""
        marker = self.success_marker(stage)
        if marker is None:
            raise FileNotFoundError(
                f"stage '{stage}' is not complete in {self.uri}: run it first (the pipeline does so by itself)"
            )
        return marker

    def identity(self, stage: str) -> str:
        """Return the identity of a complete stage's result. Raises FileNotFoundError as `complete_marker` does."""
        return self.complete_marker(stage).identity

    def measure(self, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """How many files and bytes each table (a folder, of which Parquet files count) or file has, from listings."""
        return {name: self._measure(name) for name in names}

    def damage(self, stage: str) -> tuple[str, ...]:
        """Return how the tables of a complete stage differ from what its marker says of them, a line for each."""
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

    def table_files(self, *parts: str) -> list[str]:
        """The paths of a table's Parquet files, in the order of their names; none if it has no rows."""
        root = self.path(*parts)
        files = filesystem.list_files(root)
        return [filesystem.join(root, info.base_name) for info in files if info.base_name.endswith(".parquet")]

    def counted_files(self, *parts: str) -> list[tuple[str, int]]:
        """`table_files`, with the rows of each from its footer."""
        paths = self.table_files(*parts)
        return list(zip(paths, filesystem.map_files(filesystem.num_rows, paths), strict=True))

    def read_table(self, *parts: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table file by file, in the order of their names."""
        for path in self.table_files(*parts):
            yield filesystem.read_table(path, columns)

    def read_column(self, *parts: str, column: str) -> np.ndarray:
        """One numeric column of a whole table, in file order. Memory: its bytes a row."""
        chunks = [table[column].to_numpy() for table in self.read_table(*parts, columns=[column])]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)

    def read_rows(self, table: str, sample_ids: np.ndarray, columns: list[str]) -> pa.Table:
        """The rows of a table in range files with the given ids, in the order given; reads only files that hold them.

        Raises KeyError naming ids that the table lacks.
        """
        wanted = np.unique(np.asarray(sample_ids, dtype=np.int64))
        names = [schema.SAMPLE_ID, *columns]
        files = self.table_files(table)
        found = []
        for path in files:
            first, last = schema.parse_range_file(path)
            low, high = np.searchsorted(wanted, [first, last + 1])
            if low < high:
                rows = filesystem.read_table(path, names)
                found.append(rows.filter(np.isin(rows[schema.SAMPLE_ID].to_numpy(), wanted[low:high])))
        if not found and files:
            found = [filesystem.read_schema(files[0]).empty_table().select(names)]
        rows = pa.concat_tables(found) if found else pa.table({schema.SAMPLE_ID: pa.array([], pa.int64())})
        have = rows[schema.SAMPLE_ID].to_numpy()
        missing = np.setdiff1d(wanted, have)
        if len(missing):
            raise KeyError(f"{self.path(table)} has no sample_id {missing[:5].tolist()} ({len(missing)} missing)")
        order = np.argsort(have)
        return rows.take(order[np.searchsorted(have[order], sample_ids)])

    def read_range(self, *parts: str, first: int, last: int) -> Iterator[pa.Table]:
        """Yield the rows of a table in range files with first <= sample_id <= last, by file, in the order of ids."""
        for path in self.table_files(*parts):
            file_first, file_last = schema.parse_range_file(path)
            if file_first <= last and file_last >= first:
                yield filesystem.read_range(path, schema.SAMPLE_ID, first, last)

    def _read_marker(self, stage: str, name: str) -> Marker | None:
        path = self.path(stage, name)
        try:
            return Marker.from_json(filesystem.read_bytes(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            what_to_do = (
                "delete it, and the stage goes on from what is complete"
                if name == schema.SUCCESS_FILE
                else f"how stage {stage} was begun is not known any more: delete {self.path(stage)} and run again with "
                "on_change=rerun"
            )
            raise BadMarkerError(f"{path} cannot be read: {error}. Restore it, or {what_to_do}.") from error


class Overlay(RunDir):
    """A run directory of its own for some tables and stages, which reads all others from another run directory.

    own: the beginnings of the names of what lies here, as "coreset" of coreset/ and coreset-0.3/. Nothing is ever
    written to the other one as long as only what is its own is written.
    """

    def __init__(self, uri: str | os.PathLike[str], base: RunDir, own: tuple[str, ...]):
        super().__init__(uri)
        self.base, self.own = base, own

    def path(self, *parts: str) -> str:
        return super().path(*parts) if parts and parts[0].startswith(self.own) else self.base.path(*parts)
