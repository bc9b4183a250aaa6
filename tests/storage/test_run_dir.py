"""Markers say what is complete and with which config; rows are read by id from range files."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, Overlay, RunDir

MARKER = Marker("embed", {"embed.encoder": "pixels", "embed.image_size": None}, {"index": "0123"}, {"rows": 7})
BLOCKS = ((0, 4), (5, 9), (10, 12))
MISSING = 6


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    """Return a run directory with a table `embeddings` in three range files.

    One row is missing, and the rows of each file are in reverse order.
    """
    run_dir = RunDir(tmp_path / "run")
    for first, last in BLOCKS:
        ids = [i for i in range(last, first - 1, -1) if i != MISSING]
        table = pa.table({"sample_id": ids, "name": [f"n{i}" for i in ids], "square": [i * i for i in ids]})
        filesystem.write_table(run_dir.path("embeddings", schema.range_file(first, last)), table)
    return run_dir


def test_a_marker_is_read_back_as_it_was_written(run_dir):
    assert run_dir.success_marker("embed") is None and run_dir.started_marker("embed") is None
    run_dir.mark_started(MARKER)
    assert run_dir.started_marker("embed") == MARKER and run_dir.success_marker("embed") is None
    run_dir.mark_complete(MARKER)
    assert run_dir.success_marker("embed") == MARKER
    assert run_dir.identity("embed") == MARKER.identity
    assert run_dir.complete_marker("embed") == MARKER


def test_a_marker_on_disk_is_json_that_names_its_identity(run_dir, tmp_path):
    run_dir.mark_complete(MARKER)
    fields = json.loads((tmp_path / "run" / "embed" / "_SUCCESS.json").read_text())
    assert fields["identity"] == MARKER.identity and fields["config"] == MARKER.config


def test_identity_follows_config_and_inputs_alone():
    def identity(stage="embed", config=MARKER.config, inputs=MARKER.inputs, result=MARKER.result, run_id="") -> str:
        return Marker(stage, config, inputs, result, run_id).identity

    assert identity(result={"rows": 8}) == identity(run_id="another") == MARKER.identity
    assert identity(config=dict(reversed(MARKER.config.items()))) == MARKER.identity
    others = [
        identity(stage="index"),
        identity(config={**MARKER.config, "embed.image_size": 32}),
        identity(config={"embed.encoder": "pixels"}),
        identity(inputs={"index": "0124"}),
        identity(inputs={}),
    ]
    assert len({MARKER.identity, *others}) == 6


def test_a_stage_that_is_not_complete_is_an_error_that_names_it(run_dir):
    run_dir.mark_started(MARKER)
    with pytest.raises(FileNotFoundError, match=r"stage 'embed' is not complete in .*: run it first"):
        run_dir.complete_marker("embed")


def test_a_table_is_its_parquet_files_in_order_and_no_other_files(run_dir):
    run_dir.mark_complete(Marker("embeddings", {}, {}, {}))
    filesystem.write_bytes(run_dir.path("embeddings", "part-0-1.parquet.0123.tmp"), b"half-written")
    filesystem.write_bytes(run_dir.path("embeddings", "folder.parquet", "x"), b"")
    names = [filesystem.basename(path) for path in run_dir.table_files("embeddings")]
    assert names == [schema.range_file(*block) for block in BLOCKS]
    assert [table.num_rows for table in run_dir.read_table("embeddings")] == [5, 4, 3]
    assert run_dir.table_files("rejected") == []


def test_a_column_is_read_in_file_order(run_dir):
    column = run_dir.read_column("embeddings", column="square")
    assert column.tolist() == [i * i for first, last in BLOCKS for i in range(last, first - 1, -1) if i != MISSING]
    assert len(run_dir.read_column("rejected", column="square")) == 0


@pytest.mark.parametrize("ids", [[12, 0, 5], [3], [7, 7, 1, 7], list(range(5)), [11, 10, 4, 5]])
def test_rows_come_in_the_order_of_the_requested_ids(run_dir, ids):
    rows = run_dir.read_rows("embeddings", np.array(ids), ["square", "name"])
    assert rows["sample_id"].to_pylist() == ids
    assert rows["square"].to_pylist() == [i * i for i in ids]
    assert rows["name"].to_pylist() == [f"n{i}" for i in ids]


@pytest.mark.parametrize("absent", [MISSING, 13, -1])
def test_an_id_that_the_table_lacks_is_an_error_that_names_it(run_dir, absent):
    with pytest.raises(KeyError, match=rf"embeddings has no sample_id \[{absent}\] \(1 missing\)"):
        run_dir.read_rows("embeddings", np.array([0, absent, 12]), ["name"])


def test_only_files_that_hold_a_wanted_row_are_read(run_dir):
    filesystem.write_bytes(run_dir.path("embeddings", schema.range_file(5, 9)), b"broken")
    assert run_dir.read_rows("embeddings", np.array([4, 10]), ["name"])["name"].to_pylist() == ["n4", "n10"]


def test_no_ids_give_no_rows_with_every_column(run_dir):
    rows = run_dir.read_rows("embeddings", np.empty(0, np.int64), ["name"])
    assert rows.num_rows == 0 and rows["name"].to_pylist() == []


def test_names_of_range_files_sort_by_id_and_are_read_back():
    ranges = [(0, 9), (10, 99), (100, 65_535), (65_536, 999_999_999_999)]
    names = [schema.range_file(*ids) for ids in ranges]
    assert names == sorted(names)
    assert [schema.parse_range_file(name) for name in names] == ranges


def test_a_run_directory_travels_to_a_worker_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir("run")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(run_dir)).path("index", "x") == str(tmp_path / "run/index/x")


def test_an_overlay_reads_tables_of_the_other_run_and_writes_only_here(run_dir, tmp_path):
    run_dir.mark_complete(MARKER)
    overlay = pickle.loads(pickle.dumps(Overlay(tmp_path / "own", run_dir, ("select", "coreset"))))
    assert overlay.identity("embed") == run_dir.identity("embed")
    assert overlay.read_rows("embeddings", np.array([3, 11]), ["name"])["name"].to_pylist() == ["n3", "n11"]
    overlay.mark_complete(Marker("coreset-tenth", {}, {}, {"rows": 1}))
    filesystem.write_bytes(overlay.path("select", "search", "trial.json"), b"{}")
    assert (
        overlay.complete_marker("coreset-tenth").result == {"rows": 1}
        and run_dir.success_marker("coreset-tenth") is None
    )
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["coreset-tenth", "select"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["embed", "embeddings"]
