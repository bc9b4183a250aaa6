"""A run whose pool changes: what is new is appended, what is gone is not selected, and no byte of the rest changes."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from elfs_ray.config import load_config
from elfs_ray.pipeline.dry_run import describe_plan, look
from elfs_ray.pipeline.plan import check
from elfs_ray.pipeline.runner import run
from elfs_ray.pipeline.settle import settle
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select import SelectResult
from elfs_ray.storage.run_dir import RunDir
from tests.in_process import run_here
from tests.small_run import YAML
from tests.tables import contents, digit_images, png


def write_images(pool: Path, numbers: range) -> None:
    """Write digits into a folder, named by their numbers."""
    pool.mkdir(parents=True, exist_ok=True)
    images, _ = digit_images(numbers.stop)
    for number in numbers:
        (pool / f"{number:04d}.png").write_bytes(png(images[number]))


def coverage_of(pool: Path | str, run_dir: Path, *more: str):
    """Return the config of a run that needs embeddings alone."""
    keys = [f"pool.uri={pool}", f"run_dir={run_dir}", "budget=0.5", "select.method=coverage", "embed.encoder=pixels"]
    keys += ["embed.image_size=8", "embed.num_workers=1", "embed.block_images=16", "cluster.num_clusters=2"]
    return load_config(YAML, [*keys, *more])


def rows(run_dir: Path, table: str) -> dict:
    """Return the columns of a table as lists."""
    return pa.concat_tables(RunDir(run_dir).read_table(table)).to_pydict()


def actions(config) -> dict[str, str]:
    config, _ = settle(config, RunDir(config.run_dir))
    return {planned.stage.name: planned.action for planned in check(config, RunDir(config.run_dir))}


def test_a_folder_grows_and_shrinks_and_an_image_changes(ray_cluster, tmp_path, capsys, monkeypatch):
    pool, run_dir = tmp_path / "pool", tmp_path / "run"
    write_images(pool, range(40))
    run_here(monkeypatch, coverage_of(pool, run_dir, "until=embed"))
    before = contents(run_dir, "index", "embeddings")

    write_images(pool, range(38, 60))  # two of these are written again
    for number in (38, 39):
        os.utime(pool / f"{number:04d}.png", ns=(1, 1))
    for number in range(3):
        (pool / f"{number:04d}.png").unlink()
    plan = describe_plan(look(coverage_of(pool, run_dir)))
    assert "pool      57 images" in plan and "the pool has changed: 20 new, 3 gone, 2 changed" in plan
    run(coverage_of(pool, run_dir))
    assert "index     extend; the pool has changed: 20 new, 3 gone, 2 changed" in capsys.readouterr().err
    assert before.items() < contents(run_dir, "index", "embeddings").items()
    index, coreset = rows(run_dir, "index"), rows(run_dir, "coreset")
    assert index["sample_id"] == list(range(62))
    assert [Path(uri).stem for uri in index["uri"][40:]] == [f"{number:04d}" for number in range(38, 60)]
    assert rows(run_dir, "gone")["sample_id"] == [0, 1, 2, 38, 39]
    assert len(coreset["sample_id"]) == 28 and not {0, 1, 2, 38, 39} & set(coreset["sample_id"])
    assert SelectResult.read(RunDir(run_dir)).left_out == {"gone": 5}
    assert set(actions(coverage_of(pool, run_dir)).values()) == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["double_end", "random", "d2", "coverage", "auto"])
def test_a_grown_pool_is_selected_from_by_every_method(ray_cluster, tmp_path, method):
    pool, run_dir = tmp_path / "pool", tmp_path / "run"
    dynamics = ["train.network=linear", "train.epochs=2", "train.num_workers=1", "select.hard_fraction=0.1"]
    keys = [
        *dynamics,
        f"select.method={method}",
        "cluster.method=kmeans",
        "cluster.num_workers=1",
        "cluster.num_neighbors=12",
    ]
    write_images(pool, range(60))
    run(coverage_of(pool, run_dir, *keys))
    old = set(rows(run_dir, "coreset")["uri"])
    for uri in list(old)[:5]:
        Path(uri).rename(tmp_path / Path(uri).name)
    gone = {Path(uri) for uri in list(old)[:5]}
    write_images(pool, range(60, 90))
    run(coverage_of(pool, run_dir, *keys, "on_pool_change=extend"))
    coreset = rows(run_dir, "coreset")
    assert len(coreset["uri"]) == 42 and not gone & set(map(Path, coreset["uri"]))
    assert max(coreset["sample_id"]) >= 60

    # What is back has its old id, and only the selection is made again.
    for path in gone:
        (tmp_path / path.name).rename(path)
    planned = actions(coverage_of(pool, run_dir, *keys))
    assert {name for name, action in planned.items() if action != "done"} == {"index", "select", "report"}
    run(coverage_of(pool, run_dir, *keys))
    assert len(rows(run_dir, "coreset")["uri"]) == 45 and IndexResult.read(RunDir(run_dir)).rows == 90


@pytest.mark.slow
def test_a_pool_that_grew_in_five_steps_has_the_coreset_of_a_whole_one(ray_cluster, tmp_path):
    """Coverage of a pool that grew in steps chooses the images that it chooses from the whole pool."""
    pool = tmp_path / "pool"
    for step in range(5):
        write_images(pool, range(30 * step, 30 * step + 30))
        run(coverage_of(pool, tmp_path / "grown"))
    run(coverage_of(pool, tmp_path / "whole"))
    assert rows(tmp_path / "grown", "coreset")["uri"] == rows(tmp_path / "whole", "coreset")["uri"]
