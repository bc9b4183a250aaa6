"""Evaluations of finished runs: selections, who sees labels and test images, what is kept, what is reported."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import NearestNeighbors

from elfs_ray.config import ConfigError, deciding_keys
from elfs_ray.evaluation import run as evaluation
from elfs_ray.evaluation.badge import BadgeJob, buy_labels, round_ends
from elfs_ray.evaluation.chart import draw_chart
from elfs_ray.evaluation.keys import keys_of_job
from elfs_ray.evaluation.published import PUBLISHED
from elfs_ray.evaluation.report import Results, closing_lines, to_markdown
from elfs_ray.evaluation.selections import FROM_EMBEDDINGS, select_without_labels
from elfs_ray.evaluation.trials import UNFINISHED, TrialPlace
from elfs_ray.evaluation.true_labels import TrueLabels, read_labels
from elfs_ray.evaluation.workload import describe, load, make_workload
from elfs_ray.methods.selection import pruning
from elfs_ray.pipeline import reselect
from elfs_ray.runtime import progress
from elfs_ray.stages.neighbors import NeighborsResult
from elfs_ray.stages.select import run as select
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests import selections
from tests.tables import contents, digit_images, digits_config, mark, png, write_trained

JOB = Path(__file__).parent.parent.parent / "jobs" / "evaluate.py"
NUM_POOL, NUM_TEST = 1003, 200
METHODS = (
    "random,prototypicality,d2,kmeans_centres,typiclust,aum_hardest,elfs,elfs_auto,elfs+score=el2n+balance=true,dual,"
    "badge,full"
)


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> Path:
    """Return a folder with `run`, a complete run of 1,003 labelled digits, and `test.parquet`, 200 other digits."""
    folder = tmp_path_factory.mktemp("finished")
    write_run(folder / "run", digit_images(NUM_POOL)[1])
    images, labels = digit_images(NUM_POOL + NUM_TEST)
    write_test(folder / "test.parquet", images[NUM_POOL:], labels[NUM_POOL:])
    return folder


def write_run(folder: Path, labels: np.ndarray) -> None:
    run_dir, config = RunDir(folder), digits_config(folder, "pool.label=label", "budget=[0.1,0.3]")
    ids = write_trained(run_dir)["sample_id"]
    (path,) = run_dir.table_files(schema.INDEX)
    rows = filesystem.read_table(path)
    filesystem.write_table(path, rows.set_column(2, rows.schema.field(2), pa.array(labels, pa.int32())))
    write_neighbors(run_dir, ids)
    keys = {f"pool.{key}": value for key, value in deciding_keys(config.pool).items()}
    run_dir.mark_complete(replace(run_dir.complete_marker("index"), config=keys))
    for stage in ("embed", "train"):
        keys = {f"{stage}.{key}": value for key, value in deciding_keys(getattr(config, stage)).items()}
        run_dir.mark_complete(replace(run_dir.complete_marker(stage), config=keys))
    result = select.run_select(config, run_dir)
    wanted = reselect.marker_of(config, run_dir)
    run_dir.mark_complete(replace(wanted, result=result.to_json(), outputs=run_dir.measure(wanted.outputs)))


def write_neighbors(run_dir: RunDir, ids: np.ndarray) -> None:
    vectors = np.concatenate([schema.matrix_of(rows, "embedding") for rows in run_dir.read_table("embeddings")])
    search = NearestNeighbors(n_neighbors=11, metric="cosine").fit(vectors.astype(np.float64))
    distances, places = search.kneighbors(vectors.astype(np.float64))
    columns = [pa.array(ids), schema.matrix_column(ids[places[:, 1:]])]
    columns.append(schema.matrix_column((1 - distances[:, 1:]).astype(np.float32)))
    table = pa.table(columns, schema=schema.neighbors_schema(10))
    filesystem.write_table(run_dir.path(schema.NEIGHBORS, schema.range_file(0, NUM_POOL - 1)), table)
    mark(run_dir, NeighborsResult(len(ids), 10, "exact"))


def write_test(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    columns = {"image": [png(image) for image in images], "label": labels.astype(np.int32)}
    pq.write_table(pa.table(columns), path)


def keys(folder: Path, out: Path, *others: str) -> list[str]:
    return [
        *(f"runs=[{folder / 'run'}]", f"out={out}", f"test_uri={folder / 'test.parquet'}", "ray_address=local"),
        *("budgets=[0.1,0.3]", "num_seeds=2", "network=small_cnn", "lr=0.05", "iterations=12", "batch_size=32"),
        *("num_tests=3", "badge.rounds=2", f"methods=[{METHODS}]", *others),
    ]


@pytest.fixture(scope="module")
def judged(finished, tmp_path_factory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("judged")
    return out, evaluation.run(load(keys(finished, out)))


@pytest.mark.slow
def test_every_selection_is_trained_on_for_the_same_number_of_steps(judged):
    """Each method is trained at each budget with each seed; the table shows mean and spread over the seeds."""
    out, results = judged
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [line.name for line in results.lines] == METHODS.split(",")
    for line in results.lines:
        of_line = [row for row in rows if row["selection"] == line.name]
        budgets = [("all", 1000)] if line.name == "full" else [("0.1", 100), ("0.3", 300)]
        assert {(row["budget"], row["num_samples"], row["seed"]) for row in of_line} == {
            (*budget, seed) for budget in budgets for seed in (0, 1)
        }
        assert all((row["iterations"], len(row["accuracies"])) == (12, 3) for row in of_line)
        for budget, cell in line.cells.items():
            last = [row["last_accuracy"] for row in of_line if row["budget"] == budget]
            assert (cell.mean, cell.spread) == (pytest.approx(np.mean(last)), pytest.approx(np.std(last, ddof=1)))
            assert cell.best_mean >= cell.mean


@pytest.mark.slow
def test_each_method_selects_its_samples_from_the_tables_of_the_run(finished, judged):
    config = load(keys(finished, judged[0]))
    chosen = select_without_labels(config, make_workload(config), RunDir(judged[0]))
    ids_of = {(made.entry.name, made.budget, made.seed): made.sample_ids for made in chosen}
    run_dir = RunDir(finished / "run")
    for budget, table in (("0.1", "coreset"), ("0.3", "coreset-0.3")):
        assert np.array_equal(ids_of["elfs", budget, 0], np.sort(run_dir.read_column(table, column="sample_id")))
    assert not (judged[0] / "selections" / "elfs").exists()  # the run has made them
    scores = pa.concat_tables(run_dir.read_table("scores"))
    ids, aum = scores["sample_id"].to_numpy(), scores["aum"].to_numpy()
    assert np.array_equal(ids_of["aum_hardest", "0.1", 1], np.sort(ids[selections.hardest(aum, ids, 100, "low")]))
    for seed in (0, 1):
        sampled = np.sort(ids[pruning.random_selection(ids, 100, seed)])
        assert np.array_equal(ids_of["random", "0.1", seed], sampled)
    assert not np.array_equal(ids_of["dual", "0.1", 0], ids_of["dual", "0.1", 1])
    assert np.array_equal(ids_of["full", "all", 0], ids)
    labels = scores["pseudo_label"].to_numpy()[np.searchsorted(ids, ids_of["elfs+score=el2n+balance=true", "0.1", 0])]
    assert np.bincount(labels).tolist() == [10] * 10


@pytest.mark.slow
def test_test_images_never_reach_a_selection(finished, judged, tmp_path, monkeypatch):
    out, _ = judged
    images, labels = digit_images(NUM_POOL + NUM_TEST)
    shutil.copytree(finished / "run", tmp_path / "run")
    write_test(tmp_path / "test.parquet", 255 - images[NUM_POOL:], (labels[NUM_POOL:] + 1) % 10)
    other = keys(finished, tmp_path / "out")
    other[2] = f"test_uri={tmp_path / 'test.parquet'}"
    config = load(other)

    def refuse(*arguments):
        os.unlink(tmp_path / "test.parquet")
        raise FileNotFoundError("every selection is made, and the test images are about to be read")

    # The test images disappear when they are about to be read: whatever exists by then was selected without them.
    monkeypatch.setattr(evaluation, "load_test_images", refuse)
    with pytest.raises(FileNotFoundError, match="every selection is made"):
        evaluation.run(config)
    monkeypatch.undo()
    selected = contents(out, "selections", "badge")
    assert selected and contents(tmp_path / "out", "selections", "badge") == selected
    assert not (tmp_path / "out" / "trials").exists()
    with pytest.raises(ConfigError, match="test_uri"):
        evaluation.run(config)


@pytest.mark.slow
def test_badge_looks_only_at_labels_that_it_has_bought(finished, judged, tmp_path):
    run_dir = RunDir(finished / "run")
    config = load(keys(finished, tmp_path))
    settings = replace(evaluation._settings(config, make_workload(config), "cpu"), iterations=6)
    pool = run_dir.read_column("clusters", "pseudo_labels", column="sample_id")
    labels = read_labels(run_dir)
    job = BadgeJob(run_dir, 8, pool, round_ends([60], 3), settings, 0)
    assert job.round_ends == (20, 40, 60)
    bought = buy_labels(job, labels, str(tmp_path / "a"), TrialPlace())
    assert len(set(bought.tolist())) == 60
    hidden = np.full_like(labels.of_id, 9)
    hidden[bought] = labels.of_id[bought]
    again = buy_labels(job, TrueLabels(hidden, ()), str(tmp_path / "b"), TrialPlace())
    assert np.array_equal(again, bought)
    os.unlink(tmp_path / "a" / "round-0002.parquet")
    assert np.array_equal(buy_labels(job, labels, str(tmp_path / "a"), TrialPlace()), bought)


@pytest.mark.slow
def test_an_evaluation_that_lost_some_files_ends_with_the_same_bytes(finished, judged):
    out, results = judged
    before = contents(out, ".")
    for path in sorted((out / "trials").iterdir())[::2]:
        path.unlink()
    shutil.rmtree(out / "selections" / "elfs_auto")
    (out / "results.parquet").unlink()
    assert evaluation.run(load(keys(finished, out))) == results
    assert contents(out, ".") == before


@pytest.mark.slow
def test_existing_trainings_count_as_done_from_the_start(finished, judged, monkeypatch):
    """The state of a training that was killed after it wrote its result is removed, too."""
    out, results = judged
    left, kept, *_ = sorted((out / "trials").iterdir())
    left.unlink()
    unfinished = Path(str(kept).removesuffix(".json") + UNFINISHED)
    unfinished.write_bytes(b"of a training that was killed after its result")
    reports: list[tuple[str, int, int]] = []
    listener = lambda name, unit, done, total, rate, running: reports.append((unit, done, total))  # noqa: E731
    monkeypatch.setattr(progress, "_listeners", [listener])
    assert evaluation.run(load(keys(finished, out))) == results
    num_trials = len(list((out / "trials").iterdir()))
    assert next(report for report in reports if report[0] == "trainings") == ("trainings", num_trials - 1, num_trials)
    assert not unfinished.exists()


@pytest.mark.slow
def test_more_methods_and_seeds_repeat_no_training(finished, judged, tmp_path):
    shutil.copytree(judged[0], tmp_path / "out")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()}
    evaluation.run(load(keys(finished, tmp_path / "out", "methods=[random,elfs+hard_fraction=0.3]", "num_seeds=3")))
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()}
    assert now.items() >= kept.items() and len(now) == len(kept) + 2 + 6


@pytest.mark.slow
def test_the_runs_are_left_as_they_were(finished, judged):
    assert not {path.name for path in (finished / "run").iterdir()} & {"badge", "trials", "selections", "_LOCK.json"}
    assert sorted(path.name for path in (finished / "run").glob("coreset*")) == [
        *("coreset", "coreset-0.3", "coreset-0.3.txt", "coreset.txt")
    ]


@pytest.mark.slow
def test_published_numbers_have_marked_rows_next_to_the_measured_ones(finished, judged):
    out, results = judged
    config = load(keys(finished, out, "published=cifar10"))
    workload = make_workload(config)
    rows = [line for line in to_markdown(config, workload, results).splitlines() if line.startswith("|")]
    published = [row for row in rows if "published" in row]
    assert "| elfs, published | 87.0 | 93.3 | – |" in published and "| full, published | – | – | 95.5 |" in published
    numbers = {f"{values[0.1]:.1f}" for values in PUBLISHED["cifar10"].values() if 0.1 in values}
    assert all(any(f"| {number} |" in row for row in published) for number in numbers)
    assert "read off its figures" in to_markdown(config, workload, results)
    plain = load(keys(finished, out))
    assert "published" not in to_markdown(plain, workload, results).lower()
    chart, plain_chart = (draw_chart(judged_by, workload, results.lines).decode() for judged_by in (config, plain))
    assert "elfs, published" in chart and "published" not in plain_chart
    bands = [item for item in ElementTree.fromstring(chart).iter() if item.get("id", "").startswith("band-")]
    assert len(bands) == len(results.lines)
    assert "dc:date" not in chart and chart == draw_chart(config, workload, results.lines).decode()


@pytest.mark.slow
def test_without_matplotlib_the_tables_are_still_written(finished, judged, monkeypatch, capfd):
    out, results = judged
    before = contents(out, ".")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluation.run(load(keys(finished, out))) == results
    assert "pip install 'elfs-ray[chart]'" in capfd.readouterr().err
    table = contents(out, ".")
    assert before.keys() - table.keys() == {"results.svg"} and table["results.md"] == before["results.md"]
    monkeypatch.undo()
    evaluation.run(load(keys(finished, out)))
    assert contents(out, ".") == before


@pytest.mark.slow
def test_the_closing_lines_have_every_selection_and_the_quality_of_the_run(judged):
    _, results = judged
    what, head, *lines = filter(None, closing_lines(results).splitlines())
    assert what == "small_cnn from scratch: test accuracy in % by budget (images), mean ± spread of 2 seeds"
    assert head.split()[1:] == ["0.1", "(100)", "0.3", "(300)", "all", "(1,000)"]
    assert [line.split()[0] for line in lines] == [*METHODS.split(","), "pseudo-labels:", "embeddings:"]
    assert all("±" in line for line in lines[:-2])
    single = Results(
        results.network,
        tuple(
            replace(line, cells={budget: replace(cell, num_seeds=1, spread=0.0) for budget, cell in line.cells.items()})
            for line in results.lines
        ),
        {},
    )
    assert "±" not in closing_lines(single)


def test_the_dry_run_describes_the_trainings_and_does_nothing(finished, tmp_path):
    text = describe(load(keys(finished, tmp_path / "out")))
    assert "46 trainings of small_cnn, 12 steps each" in text and "0.3: 300 images" in text
    assert "elfs: ELFS as in the paper" in text and "hard fraction 0.1" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "needed"),
    [
        (["runs=[/no/such]"], "no complete stage"),
        (["methods=[elf]"], "'elf' must be one of elfs"),
        (["methods=[elfs,elfs]"], "names one twice"),
        (["methods=[elfs,run]"], "run selects by elfs, which has a line already"),
        (["methods=[elfs+scor=aum]"], "did you mean select.score"),
        (["methods=[badge+score=aum]"], "badge is not made by select"),
        (["methods=[elfs+hard_fraction=0.8]"], "select.hard_fraction=0.8 asks to drop more than that"),
        (["methods=[d2+d2_neighbors=40]"], r"give cluster\.num_neighbors=40 to .*/run, run again with on_change=rerun"),
        (["budgets=[0.0001]"], "rounds down to no sample"),
        (["budgets=[1]"], "at least 2 samples"),
        (["budgets=[2000]"], "between 1 and the size of the pool"),
        (["hard_fraction=[0.1]"], "give one for each"),
        (["test_uri=/no/such"], "test_uri='/no/such' does not exist"),
        (["pool.label=digit"], "digit"),
        (["network=resnet"], "must be one of"),
        (["network=linear"], "must be one of"),
        (["iteration=3"], "did you mean iterations"),
        (["num_seeds=0"], "must be a number >= 1"),
    ],
)
def test_a_bad_evaluation_is_refused_before_any_work(finished, tmp_path, changed, needed):
    with pytest.raises(ConfigError, match=needed):
        evaluation.run(load([*keys(finished, tmp_path / "out"), *changed]))
    assert not (tmp_path / "out").exists()


def test_test_images_of_the_pool_itself_are_refused(finished, tmp_path):
    (path,) = RunDir(finished / "run").table_files(schema.INDEX)
    shutil.copytree(finished / "run", tmp_path / "run")
    rows = filesystem.read_table(path)
    uris = rows["uri"].to_pylist()
    uris[7] = f"{finished / 'test.parquet'}#row=3"
    copied = tmp_path / "run" / "index" / Path(path).name
    filesystem.write_table(str(copied), rows.set_column(1, "uri", pa.array(uris)))
    with pytest.raises(ConfigError, match="shares 1 images with the pool"):
        make_workload(load(keys(finished, tmp_path / "out", f"runs=[{tmp_path / 'run'}]")))


def test_runs_without_labels_or_of_another_pool_are_refused(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    index = run_dir.complete_marker("index")
    run_dir.mark_complete(replace(index, config={"pool.uri": "/other", "pool.label": None}))
    with pytest.raises(ConfigError, match=r"no true labels, as its pool.label was null: give pool.label="):
        make_workload(load(keys(finished, tmp_path / "out", f"runs=[{tmp_path / 'run'}]")))
    with pytest.raises(ConfigError, match="a run of another pool"):
        make_workload(load(keys(finished, tmp_path / "out", f"runs=[{finished / 'run'},{tmp_path / 'run'}]")))


def test_two_runs_of_one_pool_share_what_needs_no_pseudo_label(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "other")
    other = RunDir(tmp_path / "other")
    index, cluster = other.complete_marker("index"), other.complete_marker("cluster")
    other.mark_complete(replace(index, config={**index.config, "pool.label": None}))
    other.mark_complete(replace(cluster, result={**cluster.result, "method": "temi"}))
    runs = f"runs=[{finished / 'run'},{tmp_path / 'other'}]"
    workload = make_workload(load(keys(finished, tmp_path / "out", runs, "methods=[random,d2,run,dual]")))
    assert [entry.name for entry in workload.entries] == [
        "random",
        "d2",
        "elfs-file",
        "elfs-temi",
        "dual-file",
        "dual-temi",
    ]


def test_baselines_around_centres_are_chosen_once(finished, tmp_path, monkeypatch):
    config = load(keys(finished, tmp_path, "methods=[kmeans_centres,typiclust]", "budgets=[0.02]"))
    made = select_without_labels(config, make_workload(config), RunDir(tmp_path))
    run_dir = RunDir(finished / "run")
    tables = pa.concat_tables(run_dir.read_table(schema.EMBEDDINGS))
    ids, embeddings = tables["sample_id"].to_numpy(), schema.matrix_of(tables, "embedding")
    for choice in made:
        expected = FROM_EMBEDDINGS[choice.entry.name](embeddings, ids, 20, seed=0)
        assert np.array_equal(choice.sample_ids, np.sort(ids[expected]))
    assert [(choice.entry.name, choice.seed) for choice in made] == [
        (name, seed) for name in ("kmeans_centres", "typiclust") for seed in (0, 1)
    ]

    def fail(*arguments):
        raise AssertionError("selected again")

    monkeypatch.setattr("elfs_ray.evaluation.selections._select_from_embeddings", fail)
    again = select_without_labels(config, make_workload(config), RunDir(tmp_path))
    assert [choice.sample_ids.tolist() for choice in again] == [choice.sample_ids.tolist() for choice in made]


@pytest.mark.slow
def test_a_killed_and_repeated_job_equals_an_undisturbed_one(finished, judged, tmp_path):
    command = [sys.executable, str(JOB), *keys(finished, tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.glob("trials/*.json"))) < 5:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert not (tmp_path / "results.parquet").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert f"results  {tmp_path}/results.parquet" in again.stdout
    results = ("results.parquet", "results.md", "results.svg")
    assert [(tmp_path / name).read_bytes() for name in results] == [(judged[0] / name).read_bytes() for name in results]


@pytest.mark.slow
def test_supervised_methods_score_a_proxy_that_learned_the_true_labels(finished, tmp_path):
    """The run itself is left as it was."""
    before = contents(finished / "run", "clusters", "dynamics", "scores", "train")
    results = evaluation.run(load(keys(finished, tmp_path, "methods=[aum_ccs,el2n,forgetting]")))
    assert [line.name for line in results.lines] == ["aum_ccs", "el2n", "forgetting"]
    (folder,) = (tmp_path / "supervised").iterdir()
    run_dir = RunDir(folder)
    ids, labels = (
        run_dir.read_column("clusters", "pseudo_labels", column=name) for name in ("sample_id", "pseudo_label")
    )
    assert np.array_equal(labels, digit_images(NUM_POOL)[1][ids])
    assert TrainResult.read(run_dir).epochs == 2
    coresets = [RunDir(path.parent) for path in tmp_path.glob("selections/*/*/coreset-0.3")]
    sizes = [len(selection.read_column("coreset-0.3", column="sample_id")) for selection in coresets]
    assert sizes == [300] * 4  # CCS has two seeds
    assert contents(finished / "run", "clusters", "dynamics", "scores", "train") == before


def test_trainings_after_a_run_without_stage_train_take_the_augmentation_of_the_job(tmp_path):
    config = digits_config(tmp_path, "evaluate.network=small_cnn", "evaluate.test_uri=/test", "pool.label=label")
    train = replace(config.train, augmentation="crop", crop_padding=3, mean=[0.1, 0.2, 0.3])
    source = SimpleNamespace(run_dir=RunDir(tmp_path), config=config)
    evaluate = keys_of_job(config)
    settings = evaluation._settings(evaluate, SimpleNamespace(sources=[source]), "cpu", train)
    assert (settings.crop_padding, settings.flip, settings.mean) == (3, False, [0.1, 0.2, 0.3])
    mark(source.run_dir, TrainResult(1, 1, 1, "memory", []))
    settings = evaluation._settings(evaluate, SimpleNamespace(sources=[source]), "cpu", train)
    assert settings.mean == config.train.mean
