"""A job with test images evaluates its run at the end, and refuses a bad evaluation before the run starts."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression

from elfs_ray.cli import run_config
from elfs_ray.config import Config, ConfigError, fields_of, load_config
from elfs_ray.config.evaluate import EvaluateConfig
from elfs_ray.evaluation import job
from elfs_ray.evaluation.keys import keys_of_job
from elfs_ray.methods.training.linear_probe import L2_PENALTY
from elfs_ray.methods.training.networks import EMBEDDING_LENGTH
from elfs_ray.presets import preset
from elfs_ray.storage.run_dir import RunDir
from tests.in_process import without_ray
from tests.tables import digit_images, embeddings_of, png

NUM_POOL, NUM_TEST = 300, 100
SETTINGS = ("evaluate.network=small_cnn", "evaluate.iterations=12", "evaluate.batch_size=32", "evaluate.num_seeds=2")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Return a folder with 300 labelled digits, pool.parquet, and 100 others, test.parquet."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = digit_images(NUM_POOL + NUM_TEST)
    for name, part in (("pool", slice(NUM_POOL)), ("test", slice(NUM_POOL, None))):
        columns = {"image": [png(image) for image in images[part]], "label": labels[part].astype(np.int32)}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def config_of(digits: Path, run_dir: Path, *overrides: str, name: str = "cifar10") -> Config:
    return load_config(
        preset(name),
        [
            *(f"pool.uri={digits / 'pool.parquet'}", "pool.label=label", f"run_dir={run_dir}", "ray_address=local"),
            *(
                "budget=[0.1,0.3]",
                "select.method=double_end",
                "select.hard_fraction=0.1",
                "embed.encoder=pixels",
                "embed.image_size=8",
                "embed.num_workers=1",
            ),
            *(
                "embed.proxy_image_size=8",
                "embed.resize=null",
                "train.image_size=null",
                "cluster.method=kmeans",
                "cluster.num_clusters=10",
            ),
            *("cluster.num_workers=2", "train.network=small_cnn", "train.epochs=1", "train.num_workers=1"),
            *("train.augmentation=crop", "train.crop_padding=1", f"evaluate.test_uri={digits / 'test.parquet'}"),
            *SETTINGS,
            *overrides,
        ],
    )


def first_words(printed: str) -> dict[str, str]:
    return {line.split()[0]: line for line in printed.splitlines() if line}


@pytest.mark.slow
def test_a_job_with_test_images_evaluates_all_its_budgets(ray_cluster, digits, tmp_path, capfd):
    """Typing the command again repeats nothing, and another method adds only its trainings.

    Test images that are near-duplicates of images in the pool are told after trainings from scratch, too.
    """
    config = config_of(digits, tmp_path, "duplicates.threshold=0.95")
    run_config(config)
    printed = capfd.readouterr().out
    lines = first_words(printed)
    pool, test = (
        embeddings_of(RunDir(place)).astype(np.float64) for place in (tmp_path, tmp_path / "evaluate" / "test")
    )
    num_leaking = int(((test @ pool.T).max(axis=1) >= 0.95).sum())
    assert num_leaking and f"{num_leaking} of 100 test images" in lines["leaks:"]
    assert {"elfs", "random", "pseudo-labels:", "embeddings:", "table", "coreset", "report"} <= lines.keys()
    assert "0.1 (30)" in lines["selection"] and "0.3 (90)" in lines["selection"]
    assert lines["table"].split()[1] == str(tmp_path / "evaluate" / "results.md")
    rows = pq.read_table(tmp_path / "evaluate" / "results.parquet").to_pylist()
    assert [(row["selection"], row["num_samples"]) for row in rows if row["seed"] == 1] == [
        (method, count) for method in ("elfs", "random") for count in (30, 90)
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluate" / "trials").iterdir()}
    assert len(times) == 8
    run_config(config_of(digits, tmp_path, "duplicates.threshold=0.95", "evaluate.methods=[random,elfs,aum_hardest]"))
    again = capfd.readouterr()
    assert "nothing to do: every stage is complete" in again.err
    repeated = first_words(again.out)
    assert all(repeated[method].split() == lines[method].split() for method in ("elfs", "random"))
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluate" / "trials").iterdir()}
    assert now.items() >= times.items() and len(now) == 12


@pytest.fixture
def one_process(monkeypatch, tmp_path) -> Iterator[None]:
    with without_ray(monkeypatch, tmp_path):
        yield


def test_a_run_without_training_is_evaluated_by_linear_probes(one_process, digits, tmp_path, capfd):
    """Without a GPU; they agree with scikit-learn's logistic regression, and are never repeated."""
    keys = ["select.method=coverage", "evaluate.network=auto", "evaluate.badge.rounds=2"]
    keys.append("evaluate.methods=[random,run,badge,full]")
    config = config_of(digits, tmp_path, *keys)
    assert "14 linear probes of the embeddings; on random, run," in job.describe(config)
    results = job.run_with_results(config)[1]
    assert not (tmp_path / "dynamics").exists() and not (tmp_path / "proxy_images").exists()
    out = tmp_path / "evaluate"
    lines = {line.name: line for line in results.lines}
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {(row["network"], row["iterations"]) for row in rows} == {("linear_probe", None)}
    train, test = (embeddings_of(RunDir(place)) for place in (tmp_path, out / "test"))
    labels = digit_images(NUM_POOL + NUM_TEST)[1]
    reference = LogisticRegression(C=1 / (2 * NUM_POOL * L2_PENALTY), max_iter=5000)
    reference.fit(EMBEDDING_LENGTH * train.astype(np.float64), labels[:NUM_POOL])
    expected = reference.score(EMBEDDING_LENGTH * test.astype(np.float64), labels[NUM_POOL:])
    assert lines["full"].cells["all"].mean == pytest.approx(expected, abs=0.02)
    assert lines["random"].cells["0.1"].spread > 0
    assert all(lines[name].cells["0.1"].spread == 0 for name in ("coverage", "badge"))  # one selection for all seeds
    text = (out / "results.md").read_text()
    assert "A linear probe" in text and "steps of" not in text and "| none | – |" in text
    times = {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}
    assert job.run_with_results(config)[1] == results
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = ("random", "coverage", "badge")
    assert metrics["test_accuracy"] == pytest.approx({name: lines[name].cells["0.1"].mean for name in names})
    assert f"<b>{lines['coverage'].cells['0.1'].mean:.1%}</b> right" in (tmp_path / "report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()} == times


def test_a_run_that_ends_before_select_says_that_it_is_not_evaluated(one_process, digits, tmp_path, capfd):
    config = config_of(digits, tmp_path, "until=index")
    assert "evaluate  left out, as until=index" in job.describe(config)
    job.run(config)
    assert "evaluate  left out, as until=index" in capfd.readouterr().err
    assert not (tmp_path / "evaluate").exists()


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["pool.label=null"], r"evaluate\.test_uri also needs the true labels of the pool: give pool\.label="),
        (["evaluate.test_uri=null"], r"evaluate\.network=small_cnn .* give evaluate\.test_uri="),
        (["evaluate.network=linear"], r"evaluate\.network='linear'"),
        (["evaluate.methods=[elf]"], r"evaluate\.methods: 'elf' must be one of elfs"),
        (["evaluate.methods=[elfs,run]"], r"evaluate\.methods: run selects by elfs, which has a line already"),
        (["evaluate.methods=[elfs,elfs]"], r"evaluate\.methods=\['elfs', 'elfs'\] names one twice"),
        (["evaluate.methods=[elfs+scor=aum]"], r"did you mean select\.score"),
        (["evaluate.methods=[d2]"], r"evaluate\.methods: d2: .*give cluster\.num_neighbors=10"),
        (["evaluate.test_uri=/no/such"], r"evaluate\.test_uri: test_uri='/no/such' does not exist"),
        (["budget=1"], "needs at least 2 images"),
        (
            ["select.method=coverage", "evaluate.methods=[aum_hardest]"],
            r"evaluate\.methods: aum_hardest needs stage cluster and stage train, which a run with select\.method",
        ),
        (["select.method=coverage", "evaluate.methods=[elfs]"], "elfs needs stage cluster and stage train"),
    ],
)
def test_a_bad_evaluation_is_refused_before_any_work(digits, tmp_path, overrides, needed):
    with pytest.raises(ConfigError, match=needed):
        job.run(config_of(digits, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_test_images_that_are_in_the_pool_are_refused_before_any_work(digits, tmp_path):
    for pool, test in ((digits, digits / "test.parquet"), (digits / "test.parquet", digits)):
        with pytest.raises(ConfigError, match=r"and the pool share .*test\.parquet"):
            job.run(config_of(digits, tmp_path / "run", f"pool.uri={pool}", f"evaluate.test_uri={test}"))
    for name in ("train/cat/1.png", "val/cat/2.png"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(png(digit_images(1)[0][0]))
    places = (f"pool.uri={tmp_path / 'folder'}", f"evaluate.test_uri={tmp_path / 'folder' / 'val'}")
    with pytest.raises(ConfigError, match="and the pool share"):
        job.run(config_of(digits, tmp_path / "run", *places, "pool.label=folder"))


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar100", "stl10", "cinic10"])
def test_the_dry_run_of_every_job_describes_the_evaluation(digits, tmp_path, name):
    config = config_of(digits, tmp_path / "run", "evaluate.methods=[elfs,random,full]", name=name)
    assert "evaluate  10 trainings of small_cnn, 12 steps each; on elfs, random, full\n" in job.describe(config)


def test_the_evaluator_gets_every_key_of_the_section(digits, tmp_path):
    """Changing any key changes what is passed to the evaluator."""
    plain = keys_of_job(config_of(digits, tmp_path))
    for key, spec in fields_of(EvaluateConfig):
        changed = config_of(digits, tmp_path)
        section, _, name = f"evaluate.{key}".rpartition(".")
        target = changed
        for part in section.split("."):
            target = getattr(target, part)
        choices = [choice for choice in spec.metadata["choices"] if choice != getattr(target, name)]
        setattr(target, name, choices[0] if choices else "another")
        assert keys_of_job(changed) != plain, key
