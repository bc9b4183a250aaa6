"""Stage index: dense ids in a stable order; the same bytes for any number of workers, with kills and without."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.config import ConfigError
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit
from elfs_ray.runtime import tasks
from elfs_ray.stages.index import run as index
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import contents, digit_images, digits_config, png

LABEL = {"folder": "folder", "bytes": "label", "struct": "label", "uri": "label", "webdataset": "cls"}
UNIT_ROWS = (70_000, 0, 1, 61_071, 1, 65_536, 10)  # parts end within, at the end and at the start of a unit


def run(pool: Path | str, folder: Path, *overrides: str) -> tuple[pa.Table, dict]:
    """Return the index of a pool, and the result of the stage."""
    run_dir = RunDir(folder)
    result = index.run_index(digits_config(folder, f"pool.uri={pool}", *overrides), run_dir)
    return pa.concat_tables(run_dir.read_table("index")), result


@pytest.fixture(scope="module")
def large_pool(tmp_path_factory) -> Path:
    """Write Parquet files of uris, nearly 200,000 in all; some files are empty or have one row."""
    folder = tmp_path_factory.mktemp("large")
    for number, num_rows in enumerate(UNIT_ROWS):
        names = pa.array([f"{number}-{row}.png" for row in range(num_rows)], pa.string())
        pq.write_table(
            pa.table({"uri": names, "y": pa.array(np.arange(num_rows) % 7, pa.int8())}), folder / f"{number}.parquet"
        )
    return folder


@pytest.mark.parametrize("kind", LABEL)
def test_ids_are_dense_in_the_order_of_the_listing_with_labels(ray_cluster, digit_pools, tmp_path, kind):
    table, result = run(digit_pools.uris[kind], tmp_path, f"pool.label={LABEL[kind]}")
    assert table.schema.equals(schema.INDEX_SCHEMA)
    assert table["sample_id"].to_pylist() == list(range(120))
    units = find_units(str(digit_pools.uris[kind]))
    listed = [uri for unit in units for uri in list_unit(unit, PoolColumns())["uri"].to_pylist()]
    assert table["uri"].to_pylist() == listed
    assert table["label"].to_pylist() == digit_pools.labels.tolist()
    assert result.rows == 120 and result.units == len(units)
    assert result.format == {"folder": "folder", "webdataset": "webdataset"}.get(kind, "parquet")
    assert result.label_names == ([str(digit) for digit in range(10)] if kind == "folder" else [])
    assert {path.name for path in (tmp_path / "index").iterdir()} == {schema.range_file(0, 119), schema.FILES_DIR}


def test_what_is_passed_over_is_in_the_closing_line_and_the_result(ray_cluster, tmp_path, capsys):
    for name in ("train/1.png", "test/2.png", "test/3.png", "test/e.jxl", "e.jxl", "README.md", "train/0123"):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pool" / name).write_bytes(b"x")
    pools = f"[{tmp_path}/pool,{tmp_path}/p*2]"
    (tmp_path / "pool2").mkdir()
    (tmp_path / "pool2" / "4.png").write_bytes(b"x")
    _, result = run(pools, tmp_path / "run", "cluster.num_clusters=2", "budget=2", "select.hard_fraction=0")
    *_, warning, line = capsys.readouterr().err.splitlines()
    assert line == "index     4 images, pool.format=folder; passed over 2 .jxl, 1 .md, 1 no extension"
    assert warning.startswith("index     warning: 1 of 3 folders look like test or validation data")
    assert result.passed_over == {".jxl": 2, ".md": 1, "no extension": 1} and len(result.warnings) == 1
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "pool" / "test" / "more.parquet")
    with pytest.raises(ValueError, match=r"holds 4 images and 1 \.parquet file: give pool\.format=folder or"):
        run(pools, tmp_path / "other", "cluster.num_clusters=2")


def test_labels_are_null_unless_requested(ray_cluster, digit_pools, tmp_path):
    table, result = run(digit_pools.uris["folder"], tmp_path)
    assert table["label"].null_count == 120 and result.label_names == []


def test_labels_of_folders_number_the_sorted_names(ray_cluster, tmp_path):
    images, _ = digit_images(12)
    names = ["zebra/a.png", "ant/b.png", "ant/deep/bee/c.png", "cat/d.png"]
    for image, name in zip(images, [*names, *(f"cat/{i}.png" for i in range(8))], strict=True):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pool" / name).write_bytes(png(image))
    table, result = run(tmp_path / "pool", tmp_path / "run", "pool.label=folder")
    assert result.label_names == ["ant", "bee", "cat", "zebra"]
    labels = dict(zip(table["uri"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert [labels[f"{tmp_path}/pool/{name}"] for name in names] == [3, 0, 1, 2]


@pytest.mark.slow
def test_one_two_and_seven_workers_give_the_same_bytes(ray_cluster, digit_pools, large_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS_PER_CPU", 1)
    for pool, label in ((large_pool, "y"), (digit_pools.uris["folder"], "folder")):
        tables = []
        for num_workers in (1, 2, 7):
            monkeypatch.setattr(tasks, "num_cpus", lambda num_workers=num_workers: num_workers)
            folder = tmp_path / f"{label}{num_workers}"
            run(pool, folder, f"pool.label={label}")
            tables.append(contents(folder, "index"))
        assert tables[0] == tables[1] == tables[2]


def test_a_large_pool_is_cut_into_files_that_cross_its_units(ray_cluster, large_pool, tmp_path):
    table, result = run(large_pool, tmp_path, "pool.label=y")
    total = sum(UNIT_ROWS)
    bounds = [(first, min(first + 65_536, total) - 1) for first in range(0, total, 65_536)]
    assert [path.name for path in sorted((tmp_path / "index").glob("*.parquet"))] == [
        schema.range_file(*ids) for ids in bounds
    ]
    np.testing.assert_array_equal(table["sample_id"], np.arange(total))
    expected = [(f"{large_pool}/{unit}-{row}.png", row % 7) for unit, n in enumerate(UNIT_ROWS) for row in range(n)]
    assert list(zip(table["uri"].to_pylist(), table["label"].to_pylist(), strict=True)) == expected
    assert result.rows == total and result.units == len(UNIT_ROWS)


def test_killed_workers_change_no_byte(ray_cluster, digit_pools, tmp_path, monkeypatch):
    run(digit_pools.uris["folder"], tmp_path / "undisturbed")
    list_unit_task, write_part_task = index._list_unit, index._write_part

    def dying_once(task, name: str):
        def run_or_die(run_dir: RunDir, number: int, *arguments):
            flag = tmp_path / f"{name}{number}"
            if number in (0, 4) and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return task(run_dir, number, *arguments)

        return run_or_die

    monkeypatch.setattr(index, "_list_unit", dying_once(list_unit_task, "unit"))
    monkeypatch.setattr(index, "_write_part", dying_once(write_part_task, "part"))
    run(digit_pools.uris["folder"], tmp_path / "disturbed")
    assert sorted(path.name for path in tmp_path.glob("*[04]")) == ["part0", "unit0", "unit4"]
    assert contents(tmp_path / "disturbed", "index") == contents(tmp_path / "undisturbed", "index")


@pytest.mark.parametrize("killed_in", ["_list_unit", "_write_part"])
def test_a_pool_that_grew_after_a_killed_run_is_listed_anew(ray_cluster, tmp_path, monkeypatch, killed_in):
    images, _ = digit_images(40)

    def add(number: int) -> None:
        path = tmp_path / "pool" / str(number % 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(images[number]))

    def work_and_fail(*arguments):
        task(*arguments)
        raise RuntimeError("stopped")

    for number in range(20):
        add(number)
    task = getattr(index, killed_in)
    with monkeypatch.context() as patch:
        patch.setattr(index, killed_in, work_and_fail)
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path / "pool", tmp_path / "run")
    assert list((tmp_path / "run" / "index").rglob("*.parquet"))
    for number in range(20, 40):
        add(number)
    run(tmp_path / "pool", tmp_path / "run")
    run(tmp_path / "pool", tmp_path / "fresh")
    assert contents(tmp_path / "run", "index") == contents(tmp_path / "fresh", "index")


def test_a_broken_unit_is_an_error_that_names_it(ray_cluster, digit_pools, tmp_path):
    (tmp_path / "pool").mkdir()
    for path in digit_pools.uris["bytes"].iterdir():
        (tmp_path / "pool" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pool" / "train-001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=rf"{tmp_path}/pool/train-001\.parquet cannot be read as Parquet"):
        run(tmp_path / "pool", tmp_path / "run")


def test_a_tar_cut_short_gives_its_images_up_to_there(ray_cluster, digit_pools, tmp_path):
    (tmp_path / "pool").mkdir()
    whole = (digit_pools.uris["webdataset"] / "train-002.tar").read_bytes()
    (tmp_path / "pool" / "a.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pool" / "b.tar").write_bytes((digit_pools.uris["webdataset"] / "train-000.tar").read_bytes())
    table, result = run(tmp_path / "pool", tmp_path / "run", "pool.label=cls")
    units = [uri.partition("#")[0].rpartition("/")[2] for uri in table["uri"].to_pylist()]
    assert 10 < units.count("a.tar") < 69 and units.count("b.tar") == 50
    assert table["label"].to_pylist()[-50:] == digit_pools.labels[:50].tolist()
    assert result.rows == len(table)


@pytest.mark.parametrize(
    ("images", "message"),
    [(pa.array([], pa.binary()), "holds no images"), (pa.array([b"x"] * 9), "more than the pool's 9 samples")],
)
def test_an_empty_pool_or_one_smaller_than_its_clusters_is_refused(ray_cluster, tmp_path, images, message):
    pq.write_table(pa.table({"image": images}), tmp_path / "pool.parquet")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "pool.parquet", tmp_path / "run")
