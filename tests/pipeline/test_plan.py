"""What is refused before any work, without Ray: places that overlap."""

import shutil
from pathlib import Path

import pytest

from elfs_ray.config import ConfigError
from elfs_ray.pipeline.plan import PlannedStage, check
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
