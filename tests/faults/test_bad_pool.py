"""Pools as they occur: broken images, duplicates, unusual names, files that change after the listing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.stages.embed import run as embed
from elfs_ray.stages.index import run as index
from elfs_ray.storage.run_dir import RunDir
from tests.embedding import embed_in_this_process
from tests.tables import contents, digit_images, digits_config, mark, png

TABLES = ("index", "embeddings", "proxy_images", "rejected")
NUM_DIGITS = 300
NAMES = ["a b", "ünïcödé 猫", "line\nbreak", "tab\there", "quote's \"", "%41&amp;<b>", "-rf", "a#row=1", "x" * 200]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """Return 300 digits, 3 of them broken, images of 30,000 x 10 and 1 x 1 pixels, and a digit under nine names."""
    folder = tmp_path_factory.mktemp("pool")
    images, _ = digit_images(NUM_DIGITS)
    for number, image in enumerate(images):
        (folder / f"{number:03d}.png").write_bytes(png(image))
    whole = (folder / "000.png").read_bytes()
    for number, broken in ((50, b""), (51, whole[:60]), (250, b"not an image")):
        (folder / f"{number:03d}.png").write_bytes(broken)
    for name in NAMES:
        (folder / f"{name}.png").write_bytes(whole)
    Image.fromarray(np.tile(images[0], (1, 3750))).resize((30_000, 10)).save(folder / "wide.png")
    Image.fromarray(images[0][:1, :1]).save(folder / "point.png")
    return folder


def settings(pool: Path, folder: Path):
    return digits_config(folder, f"pool.uri={pool}", "embed.image_size=8", "embed.block_images=100")


def list_pool(pool: Path, folder: Path) -> RunDir:
    run_dir = RunDir(folder)
    mark(run_dir, index.run_index(settings(pool, folder), run_dir))
    return run_dir


def rows(run_dir: RunDir, table: str) -> pa.Table:
    return pa.concat_tables(run_dir.read_table(table))


@pytest.fixture(scope="module")
def embedded(ray_cluster, pool, tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("run")
    run_dir = list_pool(pool, folder)
    embed.run_embed(settings(pool, folder), run_dir)
    return run_dir


@pytest.mark.slow
def test_broken_images_are_rejected_and_no_others(embedded, pool):
    rejected = rows(embedded, "rejected").to_pylist()
    reasons = {row["uri"].removeprefix(f"{pool}/"): row["reason"] for row in rejected}
    assert reasons.keys() == {"050.png", "051.png", "250.png", "point.png"}
    assert reasons["050.png"] == "empty file (0 bytes)" and "not an image" in reasons["250.png"]
    assert reasons["point.png"] == "one colour alone, in which pixels differ from nothing"
    ids = rows(embedded, "embeddings")["sample_id"].to_pylist() + [row["sample_id"] for row in rejected]
    assert sorted(ids) == rows(embedded, "index")["sample_id"].to_pylist()


def test_duplicates_are_separate_samples_with_equal_embeddings(embedded, pool):
    uris = rows(embedded, "index")["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == NUM_DIGITS + len(NAMES) + 2
    twins = [uris.index(f"{pool}/{name}.png") for name in ("000", *NAMES)]
    for table, column in (("embeddings", "embedding"), ("proxy_images", "image")):
        values = embedded.read_rows(table, np.array(twins), [column])[column].to_pylist()
        assert all(value == values[0] for value in values)


def test_files_that_change_or_vanish_after_the_listing_are_rejected(ray_cluster, embedded, pool, tmp_path):
    pool_copy = tmp_path / "pool"
    shutil.copytree(pool, pool_copy)
    run_dir = list_pool(pool_copy, tmp_path / "run")
    (pool_copy / "100.png").unlink()
    (pool_copy / "101.png").write_bytes((pool_copy / "101.png").read_bytes()[:70])
    shutil.copy(pool_copy / "000.png", pool_copy / "102.png")
    os.truncate(pool_copy / "103.png", 0)
    (pool_copy / "104.png").unlink()
    (pool_copy / "104.png").mkdir()
    embed_in_this_process(settings(pool_copy, tmp_path / "run"), run_dir)
    rejected = {row["sample_id"]: row["reason"] for row in rows(run_dir, "rejected").to_pylist()}
    uris = rows(run_dir, "index")["uri"].to_pylist()
    before = set(rows(embedded, "rejected")["sample_id"].to_pylist())
    lost = {uris.index(f"{pool_copy}/{name}.png") for name in ("100", "101", "103", "104")}
    assert set(rejected) == before | lost
    assert all(rejected[i].startswith(("cannot be read: ", "OSError: ", "empty file", "not an image")) for i in lost)
    changed = [uris.index(f"{pool_copy}/{name}.png") for name in ("000", "102")]
    now = run_dir.read_rows("embeddings", np.array(changed), ["embedding"])["embedding"].to_pylist()
    assert now[0] == now[1], "a file that has become another image is embedded as that image"
    others = np.setdiff1d(np.arange(len(uris)), [*rejected, *changed])
    for table, column in (("embeddings", "embedding"), ("proxy_images", "image")):
        assert run_dir.read_rows(table, others, [column]).equals(embedded.read_rows(table, others, [column]))


@pytest.mark.slow
def test_parquet_files_of_several_kinds_are_one_pool(ray_cluster, pool, tmp_path):
    """Put bytes, structs, uris and nulls into separate files, as in pools that grew over years."""
    data = [(pool / f"{number:03d}.png").read_bytes() for number in range(12)]
    structs = [{"bytes": data[5], "path": None}, {"bytes": None, "path": f"{pool}/006.png"}, None]
    (tmp_path / "pool").mkdir()
    kinds = {
        "a": pa.table({"image": pa.array([*data[:3], None], pa.binary()), "extra": [1, 2, 3, 4]}),
        "b": pa.table({"image": pa.array([*data[3:5]], pa.large_binary())}),
        "c": pa.table({"image": pa.array(structs)}),
        "d": pa.table({"uri": [f"{pool}/007.png", None, "../gone.png"], "image_id": ["x", "y", "z"]}),
        "e": pa.table({"image": pa.array([], pa.binary())}),
    }
    for name, table in kinds.items():
        pq.write_table(table, tmp_path / "pool" / f"{name}.parquet")
    run_dir = list_pool(tmp_path / "pool", tmp_path / "run")
    result = embed.run_embed(settings(tmp_path / "pool", tmp_path / "run"), run_dir)
    assert (result.rows, result.rejected) == (8, 4)
    reasons = rows(run_dir, "rejected")["reason"].to_pylist()
    assert reasons[:3] == ["null: the row holds no image"] * 3 and reasons[3].startswith("cannot be read: ")


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([[b"x"], None]), pa.array([True, False])])
def test_a_parquet_file_of_another_type_is_refused_by_name(ray_cluster, pool, tmp_path, column):
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"image": [(pool / "000.png").read_bytes()] * 12}), tmp_path / "pool" / "a.parquet")
    pq.write_table(pa.table({"image": column}), tmp_path / "pool" / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: column 'image' is .*; it must hold image bytes"):
        list_pool(tmp_path / "pool", tmp_path / "run")


def test_a_copy_of_a_pool_behind_a_link_gives_the_same_bytes(ray_cluster, embedded, pool, tmp_path):
    """The copy's files were created in another order, so the file system lists them in another order."""
    shutil.copytree(pool, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    run_dir = list_pool(tmp_path / "link", tmp_path / "run")
    embed_in_this_process(settings(tmp_path / "link", tmp_path / "run"), run_dir)
    folder = Path(embedded.uri)
    assert contents(tmp_path / "run", *TABLES[1:3]) == contents(folder, *TABLES[1:3])


def run_short_of_memory(pool: Path, folder: Path, greedy: str) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("short_of_memory.py")
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, str(script), str(pool), str(folder), greedy],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_an_encoder_killed_for_its_memory_is_retried_to_the_same_bytes(ray_cluster, digit_pools, tmp_path):
    (tmp_path / "run").mkdir()
    done = run_short_of_memory(digit_pools.uris["folder"], tmp_path / "run", "encoder once")
    assert "embedded after the encoder was killed" in done.stdout, done.stderr
    config = digits_config(
        tmp_path / "whole", f"pool.uri={digit_pools.uris['folder']}", "embed.image_size=8", "embed.block_images=10"
    )
    run_dir = RunDir(tmp_path / "whole")
    mark(run_dir, index.run_index(config, run_dir))
    embed.run_embed(config, run_dir)
    assert contents(tmp_path / "run", *TABLES) == contents(tmp_path / "whole", *TABLES)


@pytest.mark.slow
def test_a_task_that_never_fits_into_memory_fails_clearly(pool, tmp_path):
    """It fails after some retries, whereas Ray by default retries for ever."""
    done = run_short_of_memory(pool, tmp_path, "task always")
    assert done.returncode == 1 and "OutOfMemoryError" in done.stderr, done.stderr
    assert 2 <= len((tmp_path / "flag").read_text()) <= 20
