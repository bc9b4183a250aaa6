"""The pipeline as a whole, on real digits: skip, refuse, rerun, and a driver killed on the way."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elfs_ray
from elfs_ray.config import ConfigError
from elfs_ray.pipeline import reselect
from elfs_ray.pipeline.dry_run import describe_plan, look
from elfs_ray.stages.select import SelectResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from tests.small_run import config_of, overrides
from tests.tables import contents, digit_images, png

TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset")
JOB = Path(__file__).parents[2] / "jobs" / "cifar10.py"


@pytest.fixture(scope="module")
def pool(small_run) -> Path:
    return small_run.pool


@pytest.fixture(scope="module")
def finished(small_run) -> Path:
    return small_run.run_dir


def run(pool: Path | str, run_dir: Path | str, *more: str) -> RunDir:
    return elfs_ray.run(config_of(pool, run_dir, *more))


def test_every_stage_leaves_its_tables_and_marker(finished):
    assert {path.name for path in finished.iterdir()} >= {*TABLES, "report.html", "metrics.json"}
    for stage in ("index", "embed", "cluster", "train", "select", "report"):
        marker = RunDir(finished).success_marker(stage)
        assert marker is not None and marker.seconds > 0 and marker.versions["ray"]


def test_no_sample_is_lost_and_the_coreset_has_the_size_of_the_budget(finished):
    def ids(table: str) -> list[int]:
        return pq.ParquetDataset(RunDir(finished).table_files(table)).read()["sample_id"].to_pylist()

    assert sorted(ids("embeddings") + ids("rejected")) == ids("index") == list(range(202))
    assert len(ids("rejected")) == 2
    assert len(ids("coreset")) == len(set(ids("coreset"))) == 50
    assert set(ids("coreset")) <= set(ids("embeddings"))


def test_two_workers_record_every_sample_once_an_epoch(finished):
    run_dir = RunDir(finished)
    assert TrainResult.read(run_dir).workers == 2
    embedded = pq.ParquetDataset(run_dir.table_files("embeddings")).read()["sample_id"].to_pylist()
    for epoch in range(3):
        files = run_dir.table_files("dynamics", f"epoch={epoch:03d}")
        recorded = [pq.read_table(path)["sample_id"].to_pylist() for path in files]
        assert len(files) == 2 and sorted(i for ids in recorded for i in ids) == embedded


def test_a_second_run_does_nothing_and_says_so(finished, pool, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run(pool, finished)
    assert "nothing to do: every stage is complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_changed_key_is_refused_with_the_difference_and_what_to_do(finished, pool):
    with pytest.raises(ConfigError) as caught:
        run(pool, finished, "train.epochs=2")
    message = str(caught.value)
    assert "train: train.epochs: 3 in the run directory, 2 now" in message
    assert "on_change=rerun to replace train, select, report" in message


def test_a_key_that_decides_nothing_may_change(finished, pool, capsys):
    run(pool, finished, "embed.num_workers=3", "cluster.num_workers=3")
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_change_nothing_but_the_label_column(finished, pool, tmp_path):
    """The folders of the pool are its labels. tests/test_layers.py reads in the sources who may see them."""
    labelled = tmp_path
    run(pool, labelled, "pool.label=folder")
    labels = pq.ParquetDataset(RunDir(labelled).table_files("index")).read()["label"].to_pylist()
    assert set(labels) == set(range(10))
    tables = [table for table in TABLES if table != "index"]
    assert contents(labelled, *tables) == contents(finished, *tables)


def test_on_change_rerun_replaces_only_what_depends_on_a_changed_key(finished, pool, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    kept = contents(run_dir, "index", "embeddings", "clusters", "dynamics")
    run(pool, run_dir, "select.hard_fraction=0.5", "on_change=rerun")
    said = capsys.readouterr().err
    assert "train     complete, skipped" in said
    assert "select    reruns and replaces scores, coreset, coreset.txt, select" in said
    assert contents(run_dir, "index", "embeddings", "clusters", "dynamics") == kept
    assert contents(run_dir, "coreset") != contents(finished, "coreset")


@pytest.mark.slow
def test_a_reselection_does_not_collide_with_the_runs_other_budgets(ray_cluster, finished, pool, tmp_path):
    run_dir = RunDir(shutil.copytree(finished, tmp_path / "run"))
    reselect.run(*reselect.load([f"run_dir={run_dir.uri}", "name=0.3", "budget=0.5"]))
    reselected = contents(tmp_path / "run", "coresets")
    run(pool, run_dir.uri, "budget=[0.25,0.4]", "on_change=rerun")
    assert len(run_dir.read_column("coreset-0.4", column="sample_id")) == 80
    run(pool, run_dir.uri, "budget=[0.25,0.3]", "on_change=rerun")
    assert len(run_dir.read_column("coreset-0.3", column="sample_id")) == 60
    assert not (tmp_path / "run" / "coreset-0.4").exists(), "what the run made with other budgets is replaced"
    assert contents(tmp_path / "run", "coresets") == reselected
    with pytest.raises(ConfigError, match=r"coresets/0\.3 was made with other keys: give another name"):
        reselect.run(*reselect.load([f"run_dir={run_dir.uri}", "name=0.3", "budget=0.6"]))


def test_unexplained_files_in_a_coresets_folder_are_refused_or_replaced(finished, pool, tmp_path, capsys):
    """Somebody has deleted the markers of stage select, or copied a coreset there."""
    run_dir = RunDir(shutil.copytree(finished, tmp_path / "run"))
    shutil.copytree(tmp_path / "run" / "coreset", tmp_path / "run" / "coreset-0.3")
    both = ["budget=[0.25,0.3]"]
    with pytest.raises(ConfigError, match=r"select: coreset-0\.3/ exists, but no marker says how it was made"):
        run(pool, run_dir.uri, *both)
    shutil.rmtree(tmp_path / "run" / "select")
    run(pool, run_dir.uri, *both, "on_change=rerun")
    assert "select    reruns and replaces scores, coreset, coreset-0.3, coreset.txt" in capsys.readouterr().err
    ids = run_dir.read_column("coreset-0.3", column="sample_id")
    assert len(ids) == len(set(ids.tolist())) == 60


@pytest.mark.slow
def test_a_linear_proxy_trains_on_the_embeddings_and_gives_a_coreset(finished, pool, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    kept = contents(tmp_path / "run", "index", "embeddings", "proxy_images", "clusters")
    run(pool, tmp_path / "run", "train.network=linear", "train.num_workers=null", "on_change=rerun")
    run_dir = RunDir(tmp_path / "run")
    result = TrainResult.read(run_dir)
    assert (result.reading, result.workers) == ("embeddings", 1)
    assert contents(tmp_path / "run", "index", "embeddings", "proxy_images", "clusters") == kept
    assert contents(tmp_path / "run", "dynamics") != contents(finished, "dynamics")
    assert SelectResult.read(run_dir).rows == SelectResult.read(RunDir(finished)).rows


def test_an_unfinished_stage_is_not_continued_with_another_config(finished, pool, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "embed" / "_SUCCESS.json").unlink()
    with pytest.raises(ConfigError, match=r"embed\.proxy_image_size: 8 in the run directory, 9 now"):
        run(pool, run_dir, "until=embed", "embed.proxy_image_size=9")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pool.uri=/no/such/place", "does not exist"),
        ("embed.encoder=resnet", "encoder"),
        ("embed.encoder=swav_resnet50", "weights"),
        ("train.network=resnet19", "must be one of"),
        ("cluster.num_clusters=203", "more than the pool's 202 samples"),
        ("budget=203", "budget"),
        ("budget=0.0001", "rounds down to no sample"),
        (
            "select.hard_fraction=0.95",
            r"leaves 0\.\d+ of the pool to drop.* give select\.hard_fraction=auto, or 0\.\d+",
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_any_work(pool, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(pool, tmp_path / "new", override)
    assert not (tmp_path / "new").exists()


def test_a_run_directory_that_is_a_file_or_in_the_pool_is_refused(pool, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match=r"run_dir=.*/file is a file: give a folder"):
        run(pool, tmp_path / "file")
    for place in (pool, Path(pool) / "run"):
        with pytest.raises(ConfigError, match=r"is in the pool.*Give a folder outside of the pool"):
            run(pool, place)
        assert not (place / "index").exists()


def test_a_file_that_does_not_fit_the_pool_ends_the_run_before_embed(pool, tmp_path):
    (tmp_path / "labelled.txt").write_text("/not/in/the/pool.png\n")
    with pytest.raises(ConfigError, match=r"not in the pool: /not/in/the/pool\.png"):
        run(pool, tmp_path / "new", "select.method=auto", f"select.labelled={tmp_path}/labelled.txt")
    assert RunDir(tmp_path / "new").success_marker("index") and not (tmp_path / "new/embeddings").exists()


def test_weights_out_of_reach_end_a_job_before_it_starts(pool, tmp_path):
    offline = {
        "TORCH_HOME": str(tmp_path / "hub"),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    keys = [f"pool.uri={pool}", f"run_dir={tmp_path / 'run'}", "ray_address=local", "cluster.num_clusters=2"]
    job = [sys.executable, "jobs/cifar10.py", *keys, "embed.encoder=torchvision/resnet18", "embed.image_size=64"]
    done = subprocess.run([*job, "until=embed"], env=os.environ | offline, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.count("Could not download the encoder's weights") == 1
    assert "embed.weights" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("sizes", "budget"), [((1, 20), 500), ((0, 1), 50)])
def test_no_budget_is_refused_because_of_an_estimate(tmp_path, sizes, budget):
    """Every other one of 130 folders is counted, and those hold the fewest images."""
    image = png(digit_images(1)[0][0])
    for number in range(130):
        folder = tmp_path / "pool" / f"{number:03d}"
        folder.mkdir(parents=True)
        for name in range(sizes[number % 2]):
            (folder / f"{name}.png").write_bytes(image)
    for requested, fits in ((budget, True), (1, True), (5000, False)):
        config = config_of(tmp_path / "pool", tmp_path / "run", f"budget={requested}")
        plan = describe_plan(look(config))
        assert f"in {tmp_path / 'pool'}, an estimate from 65 of its 130 folders" in plan
        if not fits:
            assert "budget    5000 does not fit the estimate; stage index counts every image" in plan


def test_a_budget_above_the_usable_images_is_refused_after_embed(ray_cluster, tmp_path):
    images, _ = digit_images(12)
    (tmp_path / "pool").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "pool" / f"{number:02d}.png").write_bytes(png(image) if number else b"broken")
    keys = ["budget=12", "select.hard_fraction=0", "cluster.num_clusters=2"]
    for _ in range(2):  # when embed ends, and in later runs before anything starts
        with pytest.raises(
            ConfigError, match=r"budget is 12 for a pool of 11 .*1 more could not be used, see rejected/"
        ):
            run(tmp_path / "pool", tmp_path / "run", *keys)
        assert (tmp_path / "run" / "embed" / "_SUCCESS.json").exists() and not (tmp_path / "run" / "cluster").exists()
    config = config_of(tmp_path / "pool", tmp_path / "run", *keys, "budget=0.5")
    plan = describe_plan(look(config))
    assert "pool      12 images" in plan and "budget    5 images" in plan


def test_a_new_pool_is_counted_and_not_taken_from_the_old_index(ray_cluster, pool, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "0.png").write_bytes(png(digit_images(1)[0][0]))
    run(pool, tmp_path / "run", "until=index")
    with pytest.raises(ConfigError, match="holds one image: a selection needs at least 2"):
        run(tmp_path / "few", tmp_path / "run", "until=index", "on_change=rerun", "budget=1", "select.hard_fraction=0")


def test_an_empty_pool_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        run(tmp_path / "empty", tmp_path / "run")


@pytest.mark.slow
def test_a_pool_and_a_run_directory_in_a_bucket_give_the_same_tables(finished, pool, s3_bucket):
    for path in pool.rglob("*.*"):
        filesystem.write_bytes(f"{s3_bucket}{path}", path.read_bytes())
    run_dir = f"{s3_bucket}/runs/first"
    run(f"{s3_bucket}{pool}", run_dir)
    written = {
        info.path.removeprefix(run_dir.removeprefix("s3://") + "/"): filesystem.read_bytes(f"s3://{info.path}")
        for info in filesystem.list_files(run_dir, recursive=True)
    }
    with_uris = ("index", "rejected", "coreset")
    without = [table for table in TABLES if table not in with_uris]
    assert {name: data for name, data in written.items() if name.startswith(tuple(without))} == contents(
        finished, *without
    )
    for table in with_uris:
        remote, local = (pa.concat_tables(RunDir(place).read_table(table)) for place in (run_dir, finished))
        assert [uri.removeprefix(s3_bucket) for uri in remote["uri"].to_pylist()] == local["uri"].to_pylist()
        assert remote.drop_columns("uri").equals(local.drop_columns("uri"))
    assert filesystem.read_bytes(f"{run_dir}/report.html")
    assert any(name.startswith("train/checkpoints/") for name in written)


@pytest.mark.slow
def test_ctrl_c_in_training_leaves_no_process_and_a_run_that_resumes(finished, pool, tmp_path):
    """It ends with one line, and the resumed run has the tables of an undisturbed one.

    The job runs as users run it, in the process group of a terminal and on its own Ray.
    """
    run_dir = tmp_path / "run"
    command = [sys.executable, str(JOB), *overrides(pool, run_dir, "ray_address=local")]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    with (tmp_path / "said").open("wb") as said:
        job = subprocess.Popen(command, start_new_session=True, env=environment, stdout=said, stderr=said)
    deadline = time.monotonic() + 200
    while not list(run_dir.glob("dynamics/epoch=000/*.parquet")) and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=100) == 130
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last == (
        f"interrupted: stopped in stage train; its progress and all earlier stages are kept in {run_dir}; run the same "
        "command to resume"
    )
    while processes_of_session(job.pid):
        assert time.monotonic() < deadline, processes_of_session(job.pid)
        time.sleep(0.1)
    assert not (run_dir / "train" / "_SUCCESS.json").exists() and not (run_dir / "_LOCK.json").exists()
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert resumed.returncode == 0, resumed.stderr
    assert "train     was started before, resumes" in resumed.stderr
    assert "coreset  " in resumed.stdout
    assert contents(run_dir, *TABLES) == contents(finished, *TABLES)


def processes_of_session(session: int) -> list[int]:
    """Return the pids of the running processes of a terminal's session."""
    pids = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # a process may end while it is looked at
            if folder.name.isdigit():
                state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state not in "ZX":
                    pids.append(int(folder.name))
    return pids
