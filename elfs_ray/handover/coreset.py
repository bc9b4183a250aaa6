"""Read a coreset from a run directory, in the order of its ranks, with what other tools show beside an image."""

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from elfs_ray.config import ConfigError
from elfs_ray.methods.selection.earlier import highest_cosine_before
from elfs_ray.pool.files import PoolColumns
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select.kept_coresets import list_coresets
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

METADATA = (schema.SAMPLE_ID, schema.RANK, schema.PSEUDO_LABEL, schema.SCORE, schema.SIMILARITY)
DECIMALS = 4  # of what a person reads in a tool; the tables of the run have all digits


@dataclass(frozen=True)
class Coreset:
    """A coreset to hand over.

    name: what it is called, such as photos-coreset. folder: where its exports lie by default.
    rows: rank, sample_id, uri, pseudo_label (null without clusters), score, and similarity, the cosine to the most
        similar image before it in the list (null for the first).
    places: where the tool reads each image, in the same order; the uris themselves unless they were mapped or copied.
    columns: the columns of the pool, by which images are read from Parquet files.
    """

    name: str
    folder: str
    rows: pa.Table
    places: tuple[str, ...]
    columns: PoolColumns

    def metadata(self) -> list[dict[str, Any]]:
        """Return what a tool shows beside each image, without values that are null, in the order of the coreset."""
        return [
            {name: _short(row[name]) for name in METADATA if row[name] is not None} for row in self.rows.to_pylist()
        ]

    def first(self, num_images: int) -> "Coreset":
        """Return the beginning of the coreset, which is one as well."""
        return replace(self, rows=self.rows.slice(0, num_images), places=self.places[:num_images])

    def at(self, places: tuple[str, ...]) -> "Coreset":
        """Return the coreset with its images in other places."""
        return replace(self, places=places)


def read_coreset(run_dir: RunDir, name: str) -> Coreset:
    """Return a coreset of a run: "coreset", "coreset-0.3" or, of a later selection, "round2" or "round2/coreset-0.3".

    A name may begin with coresets/, as in the run directory.

    Memory: the embeddings of the coreset, and 200 bytes an image. Raises ConfigError for a name that the run does not
    have, and FileNotFoundError for a run that has not selected yet.
    """
    kept = {coreset.name: coreset for coreset in list_coresets(run_dir)}
    name = name.rstrip("/")
    key = name if name in kept else f"{schema.CORESETS_DIR}/{name}"
    if key not in kept:
        raise ConfigError(f"coreset={name!r} is not in {run_dir.uri}: give one of {', '.join(kept)}")
    folder, table = kept[key].folder, kept[key].table
    # The run's columns and embeddings are those of every later selection.
    rows = pa.concat_tables(folder.read_table(table))
    embeddings = run_dir.read_rows(schema.EMBEDDINGS, rows[schema.SAMPLE_ID].to_numpy(), [schema.EMBEDDING])
    similarity = highest_cosine_before(schema.matrix_of(embeddings, schema.EMBEDDING))
    rows = rows.append_column(schema.SIMILARITY, pa.array(similarity, from_pandas=True))
    pool = run_dir.complete_marker(IndexResult.stage).config
    return Coreset(
        name=f"{filesystem.basename(run_dir.uri)}-{key.removeprefix(f'{schema.CORESETS_DIR}/').replace('/', '-')}",
        folder=folder.path("export", table),
        rows=rows.select([schema.RANK, schema.SAMPLE_ID, schema.URI, *METADATA[2:]]),
        places=tuple(rows[schema.URI].to_pylist()),
        columns=PoolColumns(pool.get("pool.image_column")),
    )


def _short(value: Any) -> Any:
    return round(value, DECIMALS) if isinstance(value, float) else value
