"""Take pseudo-labels from a file, for cluster.method=file.

Reads   embeddings/ (ids), index/ (uris), the Parquet file(s) at cluster.labels_uri
Writes  cluster/labels/
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elfs_ray.config import ClusterConfig
from elfs_ray.stages.index import IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_NAMED = 5
# A pool of any size may use this many labels: a few images may have labels of a large data set.
MIN_LABEL_ROOM = 1 << 16


def read_external_labels(config: ClusterConfig, run_dir: RunDir) -> np.ndarray:
    """Match the pseudo-labels of a file to the listed samples by sample_id or uri; return the label of each (N,) int32.

    The label is -1 for samples that have none. Samples with the same uri share its label. Raises ValueError for a
    missing file or column or one of another type, labels that are negative or far above the number of samples, samples
    with two labels, and ids or uris that are not in the pool. Driver memory, measured with 2 million samples: 100 bytes
    a sample by sample_id, 560 by uris of 54 bytes.
    """
    assert config.labels_uri is not None
    table = _read(config.labels_uri)
    num_samples = IndexResult.read(run_dir).rows
    labels = _checked_labels(table[schema.PSEUDO_LABEL], config.labels_uri, max(num_samples, MIN_LABEL_ROOM))
    if schema.SAMPLE_ID in table.column_names:
        return _by_id(table[schema.SAMPLE_ID], labels, num_samples, config.labels_uri)
    return _by_uri(table[schema.URI], labels, run_dir, config.labels_uri)


def write_external_labels(config: ClusterConfig, run_dir: RunDir) -> int:
    """Write the pseudo-labels of the embedded samples. Returns the number of clusters.

    Raises ValueError as `read_external_labels` does, and for embedded samples without a label.
    """
    # Only here: it imports torch and Ray, and a plan reads the labels, too.
    from elfs_ray.stages.cluster.shards import write_label_file

    label_of = read_external_labels(config, run_dir)
    files = run_dir.table_files(schema.EMBEDDINGS)
    ids_by_file = [filesystem.read_table(path, [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_numpy() for path in files]
    embedded = np.concatenate(ids_by_file)
    missing = embedded[label_of[embedded] < 0]
    if len(missing):
        raise ValueError(f"{config.labels_uri} has no pseudo_label for {_named(missing)}: label every embedded sample")
    for path, sample_ids in zip(files, ids_by_file, strict=True):
        write_label_file(run_dir, filesystem.basename(path), sample_ids, label_of[sample_ids])
    return int(label_of[embedded].max()) + 1


def _read(uri: str) -> pa.Table:
    """Return the columns pseudo_label and sample_id or, without that, uri; checked for their types and nulls."""
    if not filesystem.exists(uri):
        raise ValueError(f"cluster.labels_uri={uri!r} does not exist: give a Parquet file or a folder of them")
    try:
        table = filesystem.read_table(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cluster.labels_uri={uri!r} cannot be read as Parquet: {error}") from error
    key = schema.SAMPLE_ID if schema.SAMPLE_ID in table.column_names else schema.URI
    if schema.PSEUDO_LABEL not in table.column_names or key not in table.column_names:
        raise ValueError(
            f"cluster.labels_uri={uri!r} has columns {table.column_names}: it must have pseudo_label and sample_id or "
            "uri"
        )
    is_text = pa.types.is_string(table[key].type) or pa.types.is_large_string(table[key].type)
    for name in (schema.PSEUDO_LABEL, key):
        column = table[name]
        fits = is_text if name == schema.URI else pa.types.is_integer(column.type)
        if not fits or column.null_count:
            required = "strings" if name == schema.URI else "integers"
            raise ValueError(
                f"{uri}: {name} is {column.type} with {column.null_count} nulls; it must be {required} without nulls"
            )
    return table.select([schema.PSEUDO_LABEL, key])


def _checked_labels(column: pa.ChunkedArray, uri: str, room: int) -> np.ndarray:
    """Return the labels (n,) int32; raise ValueError unless all are from 0 to `room` - 1."""
    lowest, highest = (value.as_py() for value in pc.min_max(column).values())
    if lowest is not None and lowest < 0:
        raise ValueError(f"{uri}: the lowest pseudo_label is {lowest}; number them from 0")
    if highest is not None and highest >= room:
        raise ValueError(
            f"{uri}: the highest pseudo_label is {highest}; number the clusters from 0 without gaps: in this pool "
            f"labels must be below {room}"
        )
    return column.cast(pa.int32()).to_numpy()


def _by_id(ids: pa.ChunkedArray, labels: np.ndarray, num_samples: int, labels_uri: str) -> np.ndarray:
    """Return the label of every sample of the pool (n,) int32, -1 for samples that have none."""
    outside = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, num_samples))
    if pc.any(outside).as_py():
        unknown = np.unique(ids.filter(outside).to_numpy())
        raise ValueError(
            f"{labels_uri} labels {_named(unknown)} that are not in the pool: its {num_samples} samples are numbered "
            "from 0, as in index/"
        )
    sample_ids = ids.to_numpy().astype(np.int64)
    twice = np.flatnonzero(np.bincount(sample_ids, minlength=num_samples) > 1)
    if len(twice):
        raise ValueError(f"{labels_uri} labels {_named(twice)} more than once: give each sample one pseudo_label")
    label_of = np.full(num_samples, -1, np.int32)
    label_of[sample_ids] = labels
    return label_of


def _by_uri(uris: pa.ChunkedArray, labels: np.ndarray, run_dir: RunDir, labels_uri: str) -> np.ndarray:
    """Return the label of every sample of the pool (n,) int32, found by its uri; -1 for samples that have none."""
    # large_string: 64-bit offsets, since the uris of a large pool exceed the 2 GiB that a string array can hold.
    distinct = uris.cast(pa.large_string()).dictionary_encode().unify_dictionaries().combine_chunks()
    number = distinct.indices.to_numpy()
    label_of_uri = np.zeros(len(distinct.dictionary), np.int32)
    label_of_uri[number] = labels
    # Of several rows with one uri the last one is kept; any row with another label than that one is a conflict.
    unequal = np.unique(number[label_of_uri[number] != labels])
    if len(unequal):
        raise ValueError(
            f"{labels_uri} gives two labels each to {_listed(distinct.dictionary.take(unequal))}: give each uri one "
            "pseudo_label"
        )
    index = pa.concat_tables(run_dir.read_table(schema.INDEX, columns=[schema.SAMPLE_ID, schema.URI]))
    positions = pc.index_in(index[schema.URI].cast(pa.large_string()), value_set=distinct.dictionary)
    has_label = pc.is_valid(positions).to_numpy().astype(bool)
    matches = positions.drop_null().to_numpy()
    unknown = np.flatnonzero(np.bincount(matches, minlength=len(distinct.dictionary)) == 0)
    if len(unknown):
        raise ValueError(
            f"{labels_uri} has uris that are not in the pool: {_listed(distinct.dictionary.take(unknown))}"
        )
    label_of = np.full(index.num_rows, -1, np.int32)
    label_of[index[schema.SAMPLE_ID].to_numpy()[has_label]] = label_of_uri[matches]
    return label_of


def _listed(uris: pa.Array) -> str:
    shown = ", ".join(uris.slice(0, MAX_NAMED).to_pylist())
    return f"{len(uris)} uris ({shown}{', …' if len(uris) > MAX_NAMED else ''})"


def _named(sample_ids: np.ndarray) -> str:
    shown = ", ".join(map(str, sample_ids[:MAX_NAMED].tolist()))
    return f"{len(sample_ids)} samples (sample_id {shown}{', …' if len(sample_ids) > MAX_NAMED else ''})"
