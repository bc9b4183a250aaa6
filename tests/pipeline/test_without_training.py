"""A run that selects from embeddings alone: no clusters, no training, no copies of images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import elfs_ray
from elfs_ray.config import ConfigError, load_config
from elfs_ray.pipeline import reselect
from elfs_ray.pipeline.dry_run import describe_plan, look
from elfs_ray.pipeline.plan import make_plan
from elfs_ray.pipeline.settle import settle
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.in_process import run_here
from tests.tables import contents, digit_images, png

CLUSTERS_AND_NETWORK = (
    *(
        "cluster.num_clusters=10",
        "select.method=double_end",
        "select.hard_fraction=0.2",
        "train.network=small_cnn",
        "train.epochs=2",
    ),
    *("train.batch_size=64", "train.augmentation=crop", "train.crop_padding=1", "train.num_workers=1"),
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for number, image in enumerate(digit_images(150)[0]):
        (folder / f"{number:03d}.png").write_bytes(png(image))
    return folder


def config_for(pool, run_dir, *more):
    keys = [f"pool.uri={pool}", f"run_dir={run_dir}", "budget=30", "embed.encoder=pixels", "embed.image_size=8"]
    return load_config(None, [*keys, "embed.proxy_image_size=8", "embed.num_workers=1", *more])


@pytest.fixture(scope="module")
def covered(ray_cluster, pool, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("covered")
    elfs_ray.run(config_for(pool, run_dir, "select.method=coverage"))
    return run_dir


def test_it_has_neither_clusters_nor_training_nor_copies_and_its_plan_says_so(covered, pool, tmp_path):
    assert not {"clusters", "dynamics", "scores", "proxy_images", "cluster", "train"} & {
        path.name for path in covered.iterdir()
    }
    plan = describe_plan(look(config_for(pool, tmp_path, "select.method=coverage")))
    assert [line.split()[0] for line in plan.split("\n\n")[1].splitlines()] == ["index", "embed", "select", "report"]
    assert "pixels, no copies" in plan and "coverage without training" in plan


def test_it_has_the_same_bytes_without_ray(covered, pool, tmp_path, monkeypatch):
    run_here(monkeypatch, config_for(pool, tmp_path, "select.method=coverage"))
    tables = ("index", "embeddings", "select", "coreset")
    assert contents(tmp_path, *tables) == contents(covered, *tables)


@pytest.mark.slow
def test_clusters_and_near_duplicates_have_the_same_bytes_without_ray(ray_cluster, pool, tmp_path, monkeypatch):
    keys = ("select.method=auto", "cluster.num_clusters=auto", "cluster.num_workers=2", "duplicates.threshold=0.93")
    elfs_ray.run(config_for(pool, tmp_path / "ray", *keys))
    run_here(monkeypatch, config_for(pool, tmp_path / "here", *keys))
    tables = ("index", "embeddings", "neighbors", "duplicates", "clusters", "select", "coreset")
    assert contents(tmp_path / "here", *tables) == contents(tmp_path / "ray", *tables)


def test_a_run_is_a_table_with_paths_and_says_what_happened(covered, pool):
    run = elfs_ray.run(config_for(pool, covered, "select.method=coverage"))
    assert isinstance(run, elfs_ray.Run) and run.uri == str(covered)
    assert run.coreset.column_names == ["sample_id", "uri", "pseudo_label", "score", "rank"]
    assert run.coreset["rank"].to_pylist() == list(range(30)) and list(run.coresets) == ["coreset"]
    assert Path(run.coreset_text).read_text().splitlines() == run.coreset["uri"].to_pylist()
    assert Path(run.report).exists()
    first, coreset, text, report = repr(run).splitlines()
    assert first == f"Run in {covered}"
    assert coreset.startswith("  coreset  30 of 150 images by coverage, covering the whole pool: mean similarity 0.")
    assert (text, report) == (f"  text     {run.coreset_text}", f"  report   {run.report}")
    page = run._repr_html_()
    assert page.count("<img ") == 12 and "30 of 150 images" in page
    embeddings = np.concatenate([schema.matrix_of(table, "embedding") for table in run.read_table("embeddings")])
    assert elfs_ray.select(embeddings, 30).ids.tolist() == run.coreset["sample_id"].to_pylist()


def test_a_run_without_a_coreset_says_so_and_one_without_images_shows_none(covered, tmp_path):
    assert repr(elfs_ray.Run(tmp_path)) == f"Run in {tmp_path}, which has no coreset yet"
    assert "no coreset yet" in elfs_ray.Run(tmp_path)._repr_html_()
    moved = shutil.copytree(covered, tmp_path / "moved")
    index = next((moved / "coreset").glob("*.parquet"))
    table = filesystem.read_table(str(index))
    gone = pa.array([f"/gone/{i}.png" for i in range(table.num_rows)])
    filesystem.write_table(str(index), table.set_column(table.column_names.index("uri"), "uri", gone))
    assert elfs_ray.Run(moved)._repr_html_().startswith("<pre>Run in ")
    assert "<img" not in elfs_ray.Run(moved)._repr_html_()


def test_its_report_shows_the_chosen_images_and_how_well_they_cover_the_pool(covered):
    page = (covered / "report.html").read_text()
    coverage = reselect.SelectResult.read(RunDir(covered)).coresets["coreset"].coverage
    assert f"<b>{coverage['coreset']:.3f}</b>" in page and f"{coverage['random']:.3f}" in page
    assert coverage["coreset"] > coverage["random"]
    assert page.count("<img ") == 30
    assert "Every beginning of the list is a coreset of its own" in page
    assert "hardest" not in page and "Groups of similar images" not in page


@pytest.mark.slow
def test_embeddings_are_the_same_bytes_with_and_without_copies(covered, pool, tmp_path):
    elfs_ray.run(config_for(pool, tmp_path, *CLUSTERS_AND_NETWORK, "until=embed"))
    assert (tmp_path / "proxy_images").exists()
    assert contents(tmp_path, "embeddings") == contents(covered, "embeddings")


def test_elfs_in_its_place_is_refused_with_what_is_missing(covered, pool):
    with pytest.raises(
        ConfigError, match=r"embed: proxy_images is needed now, and was not written(.|\n)*on_change=rerun"
    ):
        elfs_ray.run(config_for(pool, covered, *CLUSTERS_AND_NETWORK))
    with pytest.raises(
        ConfigError, match=r"select.method=double_end needs stage cluster and stage train, which .* on_change=rerun"
    ):
        reselect.load([f"run_dir={covered}", "name=elfs", "select.method=double_end", "select.hard_fraction=0.2"])


def test_a_random_coreset_and_another_budget_are_selected_from_it(covered, pool):
    reselect.run(*reselect.load([f"run_dir={covered}", "name=random", "select.method=random"]))
    reselect.run(*reselect.load([f"run_dir={covered}", "name=fewer", "budget=9"]))
    lines = {
        name: (covered / folder / "coreset.txt").read_text().splitlines()
        for name, folder in (("all", "."), ("random", "coresets/random"), ("fewer", "coresets/fewer"))
    }
    assert lines["fewer"] == lines["all"][:9]
    assert len(set(lines["random"])) == 30 and lines["random"] != lines["all"]
    metrics = json.loads((covered / "metrics.json").read_text())
    assert metrics["later_selections"]["coresets/random"]["keys"] == {"select.method": "random"}
    assert metrics["later_selections"]["coresets/fewer"]["keys"] == {"budget": 9}
    assert 'value="coresets/fewer"' in (covered / "report.html").read_text()
    config, _ = settle(config_for(pool, covered, "select.method=coverage"), RunDir(covered))
    plan = make_plan(config, RunDir(covered))
    assert {planned.action for planned in plan} == {"done"}


@pytest.mark.slow
def test_a_selection_that_needs_no_copies_runs_where_they_are(ray_cluster, pool, tmp_path):
    """A run may keep more than the next one needs."""
    elfs_ray.run(config_for(pool, tmp_path, *CLUSTERS_AND_NETWORK, "until=embed"))
    plan = describe_plan(look(config_for(pool, tmp_path, "select.method=coverage")))
    assert "embed     done" in plan


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        ([], (True, False, False)),
        (["select.method=coverage"], (False, False, False)),
        (["select.method=random"], (False, False, False)),
        (["select.method=random", "select.balance=true"], (True, False, False)),
        (["select.method=prototypicality"], (True, False, False)),
        (["select.method=easiest"], (True, True, True)),
        (["select.method=coverage", "evaluate.test_uri=/x", "pool.label=folder"], (False, False, False)),
        (
            [
                *("select.method=coverage", "evaluate.test_uri=/x", "pool.label=folder"),
                "evaluate.network=small_cnn",
            ],
            (False, False, True),
        ),
        (["select.method=coverage", "embed.encoder=self_supervised"], (False, False, True)),
    ],
)
def test_one_rule_says_what_a_run_needs(keys, needed):
    config = config_for("/pool", "/run", "cluster.num_clusters=10", *keys)
    assert (config.needs_clusters, config.needs_dynamics, config.keeps_copies) == needed


def test_coverage_needs_no_key_of_the_stages_that_it_leaves_out():
    config = config_for("/pool", "/run", "select.method=coverage")
    assert config.select.hard_fraction == 0
    with pytest.raises(ConfigError, match=r"no value for cluster.num_clusters, select.hard_fraction"):
        config_for("/pool", "/run", "select.method=double_end")
    with pytest.raises(ConfigError, match=r"select.balance=true with select.method=coverage"):
        config_for("/pool", "/run", "select.method=coverage", "select.balance=true")
