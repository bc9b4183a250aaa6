"""Pseudo-labels made elsewhere, for cluster.method=file.

Reads   embeddings/ (ids), index/ (uris), the Parquet file(s) at cluster.labels_uri
Writes  cluster/labels/
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elfs_ray.config import ClusterConfig
from elfs_ray.stages.cluster_shards import write_label_file
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_NAMED = 5


def write_external_labels(config: ClusterConfig, run_dir: RunDir) -> int:
    """Match given pseudo-labels to the embedded samples by sample_id or uri; the number of clusters.

    Raises ValueError for a file or column that is missing, labels that are not integers from 0, samples without a
    label or with two. Driver memory: 12 bytes a sample by sample_id; by uri, the uris as well.
    """
    assert config.labels_uri is not None
    given = _read(config.labels_uri)
    labels = _checked_labels(given, config.labels_uri)
    ids = _sample_ids(given, run_dir, config.labels_uri)
    order = np.argsort(ids, kind="stable")
    ids, labels = ids[order], labels[order]
    twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
    if len(twice):
        raise ValueError(
            f"{config.labels_uri} labels {_named(twice)} more than once: give each sample one pseudo_label"
        )

    files = run_dir.table_files(schema.EMBEDDINGS)
    own = [filesystem.read_table(path, [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_numpy() for path in files]
    missing = np.setdiff1d(np.concatenate(own), ids, assume_unique=True)
    if len(missing):
        raise ValueError(f"{config.labels_uri} has no pseudo_label of {_named(missing)}: label every embedded sample")
    for path, sample_ids in zip(files, own, strict=True):
        write_label_file(run_dir, path.rsplit("/", 1)[1], sample_ids, labels[np.searchsorted(ids, sample_ids)])
    return int(labels[np.isin(ids, np.concatenate(own))].max()) + 1


def _read(uri: str) -> pa.Table:
    if not filesystem.exists(uri):
        raise ValueError(f"cluster.labels_uri={uri!r} does not exist: give a Parquet file or a folder of them")
    try:
        table = filesystem.read_table(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cluster.labels_uri={uri!r} cannot be read as Parquet: {error}") from error
    keys = {schema.SAMPLE_ID, schema.URI} & set(table.column_names)
    if schema.PSEUDO_LABEL not in table.column_names or not keys:
        raise ValueError(
            f"cluster.labels_uri={uri!r} has columns {table.column_names}: needed are pseudo_label and sample_id or uri"
        )
    return table


def _checked_labels(given: pa.Table, uri: str) -> np.ndarray:
    column = given[schema.PSEUDO_LABEL]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"{uri}: pseudo_label is {column.type} with {column.null_count} nulls; needed: integers, no null"
        )
    labels = column.to_numpy().astype(np.int64)
    if len(labels) and labels.min() < 0:
        raise ValueError(f"{uri}: the lowest pseudo_label is {labels.min()}; number them from 0")
    return labels


def _sample_ids(given: pa.Table, run_dir: RunDir, labels_uri: str) -> np.ndarray:
    """The sample_id of every given row: its own, or that of its uri in the index."""
    if schema.SAMPLE_ID in given.column_names:
        return given[schema.SAMPLE_ID].to_numpy().astype(np.int64)
    index = pa.concat_tables(run_dir.read_table(schema.INDEX, columns=[schema.SAMPLE_ID, schema.URI]))
    positions = pc.index_in(given[schema.URI], index[schema.URI].combine_chunks())
    if positions.null_count:
        unknown = given[schema.URI].filter(pc.is_null(positions)).slice(0, MAX_NAMED).to_pylist()
        raise ValueError(f"{labels_uri} has {positions.null_count} uris that the pool has not: {', '.join(unknown)}")
    return index[schema.SAMPLE_ID].to_numpy()[positions.to_numpy()]


def _named(sample_ids: np.ndarray) -> str:
    shown = ", ".join(map(str, sample_ids[:MAX_NAMED].tolist()))
    return f"{len(sample_ids)} samples (sample_id {shown}{', …' if len(sample_ids) > MAX_NAMED else ''})"
