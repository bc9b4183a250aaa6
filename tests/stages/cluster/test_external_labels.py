"""cluster.method=file: pseudo-labels made elsewhere, matched to the pool by sample_id or uri, or refused."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.stages.cluster.external_labels import write_external_labels
from elfs_ray.stages.cluster.run import run_cluster
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digit_images, digits_config, write_embedded

URIS = [f"/digits/{i}.png" for i in range(1003)]


def match(tmp_path, columns: Mapping[str, Sequence | pa.Array], run_dir: RunDir | None = None) -> int:
    """Give the pool of digits the labels of a table; the number of clusters."""
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), tmp_path / "labels.parquet")
    if run_dir is None:
        run_dir = RunDir(tmp_path)
        write_embedded(run_dir)
    config = digits_config(tmp_path, "cluster.method=file", f"cluster.labels_uri={tmp_path}/labels.parquet")
    return write_external_labels(config.cluster, run_dir)


def matched(tmp_path) -> tuple[np.ndarray, np.ndarray]:
    run_dir = RunDir(tmp_path)
    return tuple(run_dir.read_column("cluster", "labels", column=name) for name in ("sample_id", "pseudo_label"))


def test_labels_from_a_file_are_matched_by_uri_or_id(tmp_path):
    _, labels = digit_images(1003)
    order = np.random.default_rng(0).permutation(1003)
    for column, values in (("uri", np.array(URIS)), ("sample_id", np.arange(1003))):
        assert match(tmp_path, {column: values[order], "pseudo_label": labels[order]}) == 10
        sample_ids, pseudo_labels = matched(tmp_path)
        np.testing.assert_array_equal(pseudo_labels, labels[sample_ids])


@pytest.mark.slow
def test_labels_from_a_file_become_the_clusters(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    _, labels = digit_images(1003)
    pq.write_table(pa.table({"uri": URIS, "pseudo_label": labels}), tmp_path / "labels.parquet")
    config = digits_config(tmp_path, "cluster.method=file", f"cluster.labels_uri={tmp_path}/labels.parquet")
    run_cluster(config, run_dir)
    ids = run_dir.read_column("embeddings", column="sample_id")
    np.testing.assert_array_equal(run_dir.read_column("clusters", "pseudo_labels", column="pseudo_label"), labels[ids])


@pytest.mark.parametrize("repeated", [False, True])
def test_samples_with_one_uri_share_its_label(tmp_path, repeated):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir)
    uris = [f"/digits/{i // 3}.png" for i in range(1003)]
    index = pa.table([np.arange(1003), uris, pa.nulls(1003, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, 1002)), index)
    rows = np.arange(1003) // 3 if repeated else np.arange(335)
    columns = {"uri": [f"/digits/{i}.png" for i in rows], "pseudo_label": rows % 7}
    assert match(tmp_path, columns, run_dir) == 7
    sample_ids, labels = matched(tmp_path)
    np.testing.assert_array_equal(labels, sample_ids // 3 % 7)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64(), pa.uint64()])
def test_integers_of_any_kind_and_long_strings_are_labels_and_keys(tmp_path, kind):
    labels = np.arange(1003) % 200
    uris = pa.array(URIS, pa.large_string())
    assert match(tmp_path, {"uri": uris, "pseudo_label": pa.array(labels, kind)}) == 200
    by_uri = matched(tmp_path)
    ids = pa.array(range(1003), pa.uint64())
    assert match(tmp_path, {"sample_id": ids, "pseudo_label": pa.array(labels, kind)}) == 200
    for column, expected in zip(matched(tmp_path), by_uri, strict=True):
        np.testing.assert_array_equal(column, expected)


def test_a_small_pool_may_have_labels_of_a_large_data_set(tmp_path):
    assert match(tmp_path, {"sample_id": range(1003), "pseudo_label": [21_840] * 1003}) == 21_841


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sample_id": [0, 1], "pseudo_label": [0, 1]}, r"has no pseudo_label for 998 samples \(sample_id 2, 4, 5"),
        ({"sample_id": [*range(1003), 7], "pseudo_label": [0] * 1004}, "labels 1 samples .* more than once"),
        ({"sample_id": [*range(1002), 1003], "pseudo_label": [0] * 1003}, "sample_id 1003.* that are not in the pool"),
        ({"sample_id": [-1, *range(1, 1003)], "pseudo_label": [0] * 1003}, "sample_id -1.* that are not in the pool"),
        ({"sample_id": [0.5, 1.0], "pseudo_label": [0, 1]}, "sample_id is double .* must be integers"),
        (
            {"sample_id": [0, None], "pseudo_label": [0, 1]},
            "sample_id is int64 with 1 nulls; it must be integers without",
        ),
        ({"sample_id": ["a", "b"], "pseudo_label": [0, 1]}, "sample_id is string .* must be integers"),
        ({"sample_id": range(1003), "pseudo_label": [-1] * 1003}, "number them from 0"),
        ({"sample_id": range(1003), "pseudo_label": [0.5] * 1003}, "pseudo_label is double .* must be integers"),
        ({"sample_id": [0, 1], "pseudo_label": [0, None]}, "pseudo_label is int64 with 1 nulls; it must be integers"),
        ({"sample_id": range(1003), "pseudo_label": ["cat"] * 1003}, "pseudo_label is string .* must be integers"),
        ({"sample_id": range(1003), "pseudo_label": [3_000_000_000] * 1003}, "highest pseudo_label is 3000000000;"),
        ({"sample_id": range(1003), "pseudo_label": [65_536] * 1003}, "labels must be below 65536"),
        ({"sample_id": range(1003), "label": range(1003)}, "it must have pseudo_label and sample_id or uri"),
        ({"pseudo_label": range(1003)}, "it must have pseudo_label and sample_id or uri"),
        ({"uri": ["/none.png"], "pseudo_label": [0]}, r"uris that are not in the pool: 1 uris \(/none.png\)"),
        ({"uri": [*URIS, URIS[4]], "pseudo_label": [*range(1003), 5]}, r"two labels each to 1 uris \(/digits/4.png\)"),
        (
            {"uri": [*URIS[1:], None], "pseudo_label": [0] * 1003},
            "uri is string with 1 nulls; it must be strings without",
        ),
        ({"uri": range(1003), "pseudo_label": [0] * 1003}, "uri is int64 with 0 nulls; it must be strings"),
        ({"uri": URIS[1:], "pseudo_label": [0] * 1002}, r"has no pseudo_label for 1 samples \(sample_id 0\)"),
        (
            {"uri": pa.array([], pa.string()), "pseudo_label": pa.array([], pa.int64())},
            "has no pseudo_label for 1000 samples",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_the_reason(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        match(tmp_path, columns)
