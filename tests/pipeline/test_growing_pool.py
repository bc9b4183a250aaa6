"""A run whose pool changes: what is new is appended, what is gone is not selected, and no byte of the rest changes."""

import os
from pathlib import Path

import pyarrow as pa

from elfs_ray.config import load_config
from elfs_ray.pipeline.dry_run import describe_plan
from elfs_ray.pipeline.plan import check
from elfs_ray.pipeline.runner import run
from elfs_ray.stages.select import SelectResult
from elfs_ray.storage.run_dir import RunDir
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
    return {planned.stage.name: planned.action for planned in check(config, RunDir(config.run_dir))}


def test_a_folder_grows_and_shrinks_and_an_image_changes(ray_cluster, tmp_path, capsys):
    pool, run_dir = tmp_path / "pool", tmp_path / "run"
    write_images(pool, range(40))
    run(coverage_of(pool, run_dir))
    before = contents(run_dir, "index", "embeddings")
    assert set(actions(coverage_of(pool, run_dir)).values()) == {"done"}

    write_images(pool, range(38, 60))  # two of these are written again
    os.utime(pool / "0038.png", ns=(1, 1))
    os.utime(pool / "0039.png", ns=(1, 1))
    for number in range(3):
        (pool / f"{number:04d}.png").rename(tmp_path / f"{number:04d}.png")
    plan = describe_plan(coverage_of(pool, run_dir))
    assert "pool      57 images" in plan and "the pool has changed: 20 new, 3 gone, 2 changed" in plan
    run(coverage_of(pool, run_dir))
    assert "index     extend; the pool has changed: 20 new, 3 gone, 2 changed" in capsys.readouterr().err
    after = contents(run_dir, "index", "embeddings")
    assert before.items() < after.items()
    index, coreset = rows(run_dir, "index"), rows(run_dir, "coreset")
    assert index["sample_id"] == list(range(62))
    assert [Path(uri).stem for uri in index["uri"][40:]] == [f"{number:04d}" for number in range(38, 60)]
    assert rows(run_dir, "gone")["sample_id"] == [0, 1, 2, 38, 39]
    assert len(coreset["sample_id"]) == 28 and not {0, 1, 2, 38, 39} & set(coreset["sample_id"])
    assert SelectResult.read(RunDir(run_dir)).left_out == {"gone": 5}

    # An image that is back has its old id, and nothing is embedded.
    (tmp_path / "0001.png").rename(pool / "0001.png")
    planned = actions(coverage_of(pool, run_dir))
    assert planned == {"index": "extend", "embed": "done", "select": "update", "report": "update"}
    run(coverage_of(pool, run_dir, "budget=1.0", "on_change=rerun"))
    assert contents(run_dir, "index", "embeddings") == after
    assert sorted(rows(run_dir, "coreset")["sample_id"]) == sorted(set(range(62)) - {0, 2, 38, 39})
    assert set(actions(coverage_of(pool, run_dir, "budget=1.0")).values()) == {"done"}
