"""Say in --dry-run what a pool holds, before anything is started."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.config import ConfigError
from elfs_ray.pipeline.dry_run import describe_plan, look
from tests.small_run import config_of

FITTING = ("cluster.num_clusters=2", "budget=2", "select.hard_fraction=0")


def describe(pool: Path | str, run_dir: Path, *more: str) -> str:
    return describe_plan(look(config_of(pool, run_dir, *FITTING, *more)))


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_the_plan_names_the_format_and_what_is_passed_over(tmp_path):
    write(tmp_path / "pool", "train/1.png", "train/2.png", "test/3.png", "4.jxl", "test/5.jxl", "test/6")
    lines = describe(tmp_path / "pool", tmp_path / "run").splitlines()
    assert lines[0] == f"pool      3 images in {tmp_path / 'pool'}"
    assert lines[1:3] == ["          pool.format=folder", "          passed over 2 .jxl, 1 no extension"]
    assert lines[3].startswith("          warning: 1 of 2 folders look like test or validation data")


def test_an_estimate_from_some_folders_also_refuses_several_kinds(tmp_path):
    write(tmp_path / "pool", *(f"{number:03d}/1.png" for number in range(130)))
    assert "pool.format=folder" in describe(tmp_path / "pool", tmp_path / "run")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "pool" / "000" / "x.parquet")
    with pytest.raises(ConfigError, match=r"65 images and 1 \.parquet file"):
        describe(tmp_path / "pool", tmp_path / "run")


@pytest.mark.parametrize("uri", ["[{0}/a,{0}/b]", "{0}/[ab]", "{0}/*", "{0}/b"])
def test_a_run_directory_in_any_folder_of_the_pool_is_refused(tmp_path, uri):
    write(tmp_path, "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    for run_dir in ("b", "b/run", "b/deep/run"):
        with pytest.raises(ConfigError, match="is in the pool"):
            describe(uri.format(tmp_path), tmp_path / run_dir)
    if uri != "{0}/*":
        describe(uri.format(tmp_path), tmp_path / "b-run")


def test_the_plan_says_how_many_images_a_cluster_has(tmp_path):
    write(tmp_path / "pool", *(f"{number}.png" for number in range(60)))
    keys = ("cluster.num_clusters=40", "budget=20", "select.method=double_end", "select.hard_fraction=auto")
    plan = describe(tmp_path / "pool", tmp_path / "run", *keys)
    assert "40 clusters of 1.5 images on average" in plan
    assert "0.5 a cluster are too few for auto, which needs about 10: give a number, or search" in plan
    plan = describe(tmp_path / "pool", tmp_path / "run", "cluster.num_clusters=auto", "select.method=auto")
    assert "2 to 3 clusters, as the embeddings suggest" in plan
    assert "covers each pseudo-class first if 60% of pseudo-labels look right" in plan
