"""Decode and copy a block of images of which each has something odd: none ends the run. Without Ray."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.pool import images, parquet_rows
from elfs_ray.stages.copy.run import _copy_block
from elfs_ray.stages.embed import clock, worker
from elfs_ray.stages.embed.blocks import blocks_a_turn, say_own_range
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.image_files import encode, png_of
from tests.tables import digits_config


@pytest.fixture
def run_dir(tmp_path, photographs) -> RunDir:
    """Return a run directory with an index of four images."""
    photo = photographs[0].resize((90, 66))
    (tmp_path / "a.jpg").write_bytes(encode(photo, "JPEG"))
    (tmp_path / "long comment.gif").write_bytes(encode(photo.quantize(64), "GIF", comment=b"c" * 70_000))
    (tmp_path / "wide.png").write_bytes(encode(photo.resize((1100, 1))))
    (tmp_path / "12 bits.png").write_bytes(png_of(np.asarray(photo).astype(np.uint16) * 16, 16, 2))
    paths = sorted(str(path) for path in tmp_path.iterdir())
    run_dir = RunDir(tmp_path / "run")
    index = pa.table([np.arange(len(paths)), paths, pa.nulls(len(paths), pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, len(paths) - 1)), index)
    return run_dir


def config_of(run_dir: RunDir):
    return digits_config(Path(run_dir.uri), "embed.image_size=32", "embed.proxy_image_size=66")


def test_an_image_whose_copy_cannot_be_encoded_is_a_rejected_row(run_dir, monkeypatch):
    monkeypatch.setattr(images, "MAX_PROXY_ASPECT", 2000)  # wide.png would be 72,600 pixels wide: JPEG ends at 65,500
    config = config_of(run_dir)
    encoder = worker.DecodeAndEncodeBlock(worker.make_job(config, run_dir), "cpu")
    start_s = time.perf_counter()
    summary = encoder({"first": [0], "last": [3]})
    seconds = json.loads(summary.pop("seconds")[0])
    assert summary == {"rows": [4], "rejected": [1], "own_range": [1]}
    assert seconds.keys() == {clock.WAIT, clock.READ, clock.COPY, clock.RESIZE, clock.ENCODE, clock.WRITE}
    assert 0 < sum(seconds.values()) - seconds[clock.WAIT] <= time.perf_counter() - start_s
    (row,) = filesystem.read_table(run_dir.table_files(schema.REJECTED)[0]).to_pylist()
    assert row["uri"].endswith("/wide.png") and row["stage"] == "embed"
    assert row["reason"].startswith("its proxy image cannot be encoded: ")
    copies = filesystem.read_table(run_dir.table_files(schema.PROXY_IMAGES)[0])
    assert copies[schema.SAMPLE_ID].to_pylist() == [0, 1, 2]


def test_a_gif_with_a_long_comment_is_copied(run_dir):
    assert _copy_block(config_of(run_dir), run_dir, 0, 3) == (0, 1)


def test_the_run_says_how_many_images_are_shown_in_their_own_range(capsys):
    say_own_range("embed", 0)
    assert capsys.readouterr().err == ""
    say_own_range("embed", 1200)
    assert capsys.readouterr().err.startswith(
        "embed     1,200 images of more than 8 bits: the file does not say what is white"
    )


@pytest.mark.parametrize(
    ("kind", "rows_per_group", "num_workers", "turn"),
    [
        ("parquet", 100, 2, 16),
        ("parquet", 100, 5, 10),
        ("parquet", 100, 40, 1),
        ("parquet", 10, 2, 1),
        ("files", 100, 2, 1),
    ],
)
def test_a_worker_takes_many_blocks_of_a_long_row_group(tmp_path, monkeypatch, kind, rows_per_group, num_workers, turn):
    monkeypatch.setattr(parquet_rows, "MAX_WHOLE_BYTES", 5000)
    table = pa.table({"image": [bytes(100)] * 100})
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=rows_per_group, use_dictionary=False)
    uris = [
        f"{tmp_path}/pool.parquet#row={row}" if kind == "parquet" else f"{tmp_path}/{row}.png" for row in range(100)
    ]
    run_dir = RunDir(tmp_path / "run")
    index = pa.table([np.arange(100), uris, pa.nulls(100, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, 99)), index)
    blocks = [(row, row) for row in range(100)] * 2  # 200 blocks
    assert blocks_a_turn(config_of(run_dir), run_dir, blocks, num_workers) == turn


def test_shares_of_time_begin_with_the_largest():
    text = clock.describe_shares({clock.WRITE: 1.0, clock.ENCODE: 80.0, clock.READ: 18.8, clock.WAIT: 0.2})
    assert text == "80% encoding, 19% reading and decoding, 1% writing"
