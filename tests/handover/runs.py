"""Run directories with a coreset of real images, as a finished run leaves them, without Ray."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from elfs_ray.pool.listing import PoolColumns, find_units, list_unit
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

IDS = [17, 3, 99, 4, 50, 118]  # in no order, so that an order of names or ids is told from that of ranks


def list_pool(uri: str) -> list[str]:
    """Return the uris of a pool, in the order of sample ids."""
    columns = PoolColumns()
    return [uri for unit in find_units(str(uri)) for uri in list_unit(unit, columns)[schema.URI].to_pylist()]


def write_run(
    run_dir: RunDir,
    uris: Sequence[str],
    ids: Sequence[int] = IDS,
    *,
    clusters: bool = True,
    pool: Mapping[str, str] | None = None,
) -> None:
    """Write index/, embeddings/ and coreset/ with the samples `ids`; the embeddings lie on an arc.

    pool: keys of section pool with which the images were listed.
    """
    num_samples = len(uris)
    sample_ids = np.arange(num_samples)
    name = schema.range_file(0, num_samples - 1)
    index = pa.table([sample_ids, list(uris), pa.nulls(num_samples, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, name), index)
    run_dir.mark_complete(Marker("index", pool or {}, {}, IndexResult(num_samples, 1, "folder", []).to_json()))
    angles = sample_ids / num_samples
    vectors = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float16)
    embeddings = pa.table([sample_ids, schema.matrix_column(vectors)], schema=schema.embeddings_schema(2))
    filesystem.write_table(run_dir.path(schema.EMBEDDINGS, name), embeddings)
    run_dir.mark_complete(Marker("embed", {}, {}, EmbedResult(num_samples, 0, 2).to_json()))
    write_coreset(run_dir, uris, ids, clusters=clusters)


def write_coreset(folder: RunDir, uris: Sequence[str], ids: Sequence[int], *, clusters: bool = True) -> None:
    """Write coreset/ with its marker, in two files, as a large coreset has them."""
    labels = pa.array([i % 7 for i in ids], pa.int32()) if clusters else pa.nulls(len(ids), pa.int32())
    scores = pa.array([1 / (rank + 3) for rank in range(len(ids))], pa.float32())
    columns = [list(ids), [uris[i] for i in ids], labels, scores, list(range(len(ids)))]
    table = pa.table(columns, schema=schema.CORESET_SCHEMA)
    for first, end in ((0, 2), (2, len(ids))):
        path = folder.path(schema.CORESET, schema.range_file(first, end - 1))
        filesystem.write_table(path, table.slice(first, end - first))
    result = CoresetResult(
        rows=len(ids),
        num_hard=0,
        num_easy=0,
        num_not_drawn=0,
        hardest_kept=0.0,
        easiest_kept=0.0,
        score_min=0.0,
        score_max=1.0,
        kept_examples=[],
        hardest_examples=[],
        easiest_examples=[],
        hard_fraction=0.0,
        score="score",
        hard_side="high",
        score_table="select/coverage",
    )
    select = SelectResult(len(ids), len(uris), {schema.CORESET: result})
    folder.mark_complete(Marker("select", {}, {}, select.to_json()))
