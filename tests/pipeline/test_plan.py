"""What is refused before any work, without Ray: places that overlap, and counts that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from elfs_ray.config import ConfigError
from elfs_ray.pipeline.plan import PlannedStage, check, wanted_marker
from elfs_ray.stages.index import STAGE, IndexResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.small_run import config_of


def planned(pool: Path | str, run_dir: Path | str, *more: str) -> list[PlannedStage]:
    config = config_of(pool, run_dir, *more)
    return check(config, RunDir(config.run_dir))


def test_a_run_directory_in_the_pool_is_refused_by_any_name(digit_pools, tmp_path):
    pool = shutil.copytree(digit_pools.uris["bytes"], tmp_path / "pool")
    (tmp_path / "link").symlink_to(pool)
    for uri, run_dir in (
        *((pool, place) for place in (f"file://{pool}/run", f"file:{pool}/run", tmp_path / "link/run")),
        *((place, pool / "run") for place in (f"file://{pool}", f"{pool}//", tmp_path / "link")),
    ):
        with pytest.raises(ConfigError, match="Give a folder outside of the pool"):
            planned(uri, run_dir)
    assert planned(pool, tmp_path / "pool-run")


@pytest.mark.parametrize("kind", ["folder", "bytes", "webdataset"])
def test_a_pool_with_a_link_to_the_run_directory_is_refused(digit_pools, tmp_path, kind):
    pool = shutil.copytree(digit_pools.uris[kind], tmp_path / "pool")
    index = tmp_path / "runs/index"
    shutil.copytree(pool, index / "more")
    assert planned(pool, tmp_path / "runs", "on_change=rerun")
    (pool / "deep").mkdir()
    link = pool / "onward" if kind == "folder" else pool / "deep" / "onward"
    for target in (tmp_path / "runs", index):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(ConfigError, match=r"is in the pool.*through the link .*/onward"):
            planned(pool, tmp_path / "runs", "on_change=rerun")


def test_a_pool_in_a_folder_that_the_run_writes_is_refused(digit_pools, tmp_path):
    for name in ("embeddings/mine", "mine"):
        shutil.copytree(digit_pools.uris["bytes"], tmp_path / name)
    message = r"/mine is in .*/embeddings, which this run writes: give another run_dir"
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path / "embeddings/mine", tmp_path, "on_change=rerun")
    assert planned(tmp_path / "mine", tmp_path, "on_change=rerun")


def listed(run_dir: Path, *keys: str) -> list[PlannedStage]:
    """Plan a run whose stage index is complete, with 40 images named /pool/<number>.png."""
    run = RunDir(run_dir)
    config = config_of("/pool", run_dir, "on_pool_change=keep", *keys)
    uris = [f"/pool/{i}.png" for i in range(40)]
    index = pa.table([range(40), uris, pa.nulls(40, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run.path(schema.INDEX, schema.range_file(0, 39)), index)
    result = IndexResult(40, 1, "folder", [])
    marker = wanted_marker(STAGE, config, {})
    run.mark_complete(replace(marker, result=result.to_json(), outputs=run.measure(marker.outputs)))
    return check(config, run)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("uri", [f"/pool/{i}.png" for i in range(1, 41)], r"uris that are not in the pool: 1 uris \(/pool/40.png\)"),
        ("sample_id", range(41), r"labels 1 samples \(sample_id 40\) that are not in the pool: its 40"),
        ("sample_id", [*range(39), 0], "more than once"),
        ("other", range(40), "must have pseudo_label and sample_id or uri"),
    ],
)
def test_labels_of_another_pool_are_refused_before_embed(tmp_path, column, values, message):
    table = pa.table({column: list(values), "pseudo_label": [0] * len(values)})
    keys = ("cluster.method=file", f"cluster.labels_uri={tmp_path}/labels.parquet", "budget=2")
    filesystem.write_table(f"{tmp_path}/labels.parquet", table)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path / "run", *keys)
    fitting = pa.table({"sample_id": range(40), "pseudo_label": [0, 1] * 20})
    filesystem.write_table(f"{tmp_path}/labels.parquet", fitting)
    assert [planned.action for planned in listed(tmp_path / "run", *keys)][:2] == ["done", "run"]


def test_labelled_images_of_another_pool_are_refused_before_embed(tmp_path):
    (tmp_path / "labelled.txt").write_text("/pool/1.png\n/pool/99.png\n")
    keys = ("select.method=auto", f"select.labelled={tmp_path}/labelled.txt", "budget=2")
    with pytest.raises(ConfigError, match=r"names 1 images that are not in the pool: /pool/99\.png"):
        listed(tmp_path / "run", *keys)
    (tmp_path / "labelled.txt").write_text("/pool/1.png\n")
    assert listed(tmp_path / "run", *keys)
