"""Stage train: every sample recorded once an epoch, the same bytes after a crash, the values of a plain loop."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import nn

from elfs_ray.config import Config
from elfs_ray.methods.training.dynamics import epoch_order
from elfs_ray.methods.training.networks import build_proxy_model
from elfs_ray.stages.train import run as train
from elfs_ray.stages.train.worker import init_seed
from elfs_ray.stages.training import ray_train
from elfs_ray.stages.training import reader as proxy_reader
from elfs_ray.stages.training.reader import Augmenter
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.storage.schema import matrix_of
from tests.scripts import run_script
from tests.tables import GAPS, contents, digit_images, digits_config, write_clustered, write_trained
from tests.workers import training_worker_pids

NUM_SAMPLES = 1003
EMBEDDED = np.setdiff1d(np.arange(NUM_SAMPLES), GAPS)
# Micro-batches that divide nothing, so that every step accumulates and pads.
UNEVEN = ("train.epochs=3", "train.batch_size=50", "train.micro_batch_size=7", "train.cpus_per_worker=1")


def run(folder: Path, *overrides: str) -> dict:
    run_dir = RunDir(str(folder))
    if not (folder / "clusters").exists():
        write_clustered(run_dir, NUM_SAMPLES)
    return train.run_train(digits_config(folder, *overrides), run_dir)


def records(folder: Path, epoch: int) -> dict[str, np.ndarray]:
    rows = pq.ParquetDataset(RunDir(str(folder)).table_files("dynamics", f"epoch={epoch:03d}")).read()
    return {name: rows[name].to_numpy() for name in rows.column_names}


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor in the last checkpoint."""
    *_, path = sorted((folder / "train" / "checkpoints").glob("checkpoint_*/state.pt"))
    model = torch.load(path, weights_only=True)["model"]
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in model.items()}


GROUPS = [
    pytest.param((2, "memory"), marks=pytest.mark.slow),
    pytest.param((3, "memory"), marks=pytest.mark.slow),
    pytest.param((2, "streamed"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=GROUPS, ids=str)
def undisturbed(request, ray_cluster, tmp_path_factory) -> tuple[Path, tuple[str, ...], dict]:
    """Return the folder of a complete run, its overrides, and its result."""
    num_workers, reading = request.param
    folder = tmp_path_factory.mktemp("undisturbed")
    overrides = (*UNEVEN, f"train.num_workers={num_workers}", f"train.reading={reading}")
    return folder, overrides, run(folder, *overrides)


def test_every_sample_is_recorded_exactly_once_an_epoch(undisturbed):
    folder, overrides, result = undisturbed
    assert (result.rows, result.epochs) == (len(EMBEDDED), 3)
    assert f"train.num_workers={result.workers}" in overrides
    assert f"train.reading={result.reading}" in overrides
    assert len(list((folder / "dynamics").iterdir())) == 3
    for epoch in range(3):
        rows = records(folder, epoch)
        files = RunDir(str(folder)).table_files("dynamics", f"epoch={epoch:03d}")
        assert len(files) == result.workers
        np.testing.assert_array_equal(np.sort(rows["sample_id"]), EMBEDDED)


def test_training_learns_the_pseudo_labels_and_its_metrics_say_so(undisturbed):
    folder, _, result = undisturbed
    losses = [metrics["loss"] for metrics in result.history]
    assert losses[0] > losses[1] > losses[2]
    for epoch, metrics in enumerate(result.history):
        rows = records(folder, epoch)
        assert metrics["accuracy"] == pytest.approx((rows["target_prob"] > rows["max_other_prob"]).mean())
        assert metrics["loss"] == pytest.approx(-np.log(rows["target_prob"].astype(float)).mean(), rel=1e-4)
        assert metrics["images_per_s"] == pytest.approx(len(EMBEDDED) / metrics["seconds"])
        assert 0 < metrics["data_wait_share"] < 1 and 0 < metrics["recorder_share"] < 1
    assert result.history[-1]["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", [(2, "memory"), (2, "streamed")], indirect=True, ids=str)
def test_a_worker_killed_in_mid_epoch_changes_no_byte(undisturbed, tmp_path):
    folder, overrides, _ = undisturbed
    with _Killer(tmp_path, after_epoch=0) as killer:
        run(tmp_path, *overrides, "train.max_failures=1")
    assert killer.epochs_done is not None and 1 <= killer.epochs_done < 3
    assert contents(tmp_path, "dynamics") == contents(folder, "dynamics")
    assert weights(tmp_path) == weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", [(2, "memory")], indirect=True, ids=str)
def test_a_killed_driver_resumes_to_the_same_bytes(undisturbed, tmp_path):
    folder, overrides, _ = undisturbed
    write_clustered(RunDir(str(tmp_path / "run")), NUM_SAMPLES)
    script = (
        "import sys; from pathlib import Path; from tests.tables import digits_config\n"
        "from elfs_ray.runtime.cluster import connect; from elfs_ray.stages.train.run import run_train\n"
        "from elfs_ray.storage.run_dir import RunDir\n"
        f"folder = {str(tmp_path / 'run')!r}\n"
        f"connect('local', num_cpus=2); run_train(digits_config(Path(folder), *{overrides!r}), RunDir(folder))"
    )
    output = tmp_path / "output"
    with (
        output.open("wb") as sink,
        subprocess.Popen(
            [sys.executable, "-c", script],
            start_new_session=True,
            cwd=Path(__file__).parents[2],
            stdout=sink,
            stderr=sink,
        ) as driver,
    ):
        _wait_until(lambda: _epochs_done(tmp_path / "run") >= 1 or driver.poll() is not None)
        os.killpg(driver.pid, signal.SIGKILL)
    assert 1 <= _epochs_done(tmp_path / "run") < 3, output.read_text()
    assert all(line.startswith("train  ") for line in output.read_text().splitlines())
    run(tmp_path / "run", *overrides)
    assert contents(tmp_path / "run", "dynamics") == contents(folder, "dynamics")
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", [(2, "memory")], indirect=True, ids=str)
@pytest.mark.parametrize("broken", ["half a list", "a checkpoint that is gone", "an upload cut off"])
def test_a_broken_list_of_checkpoints_costs_no_epoch(undisturbed, tmp_path, broken):
    folder, overrides, _ = undisturbed
    copy = shutil.copytree(folder, tmp_path / "run")
    checkpoints = copy / "train" / "checkpoints"
    listed = checkpoints / ray_train.SNAPSHOT_FILE
    last = max(path for path in checkpoints.iterdir() if path.is_dir())
    if broken == "a checkpoint that is gone":
        listed.write_bytes(listed.read_bytes().replace(last.name.encode(), b"checkpoint_2000-01-01_00-00-00.000000"))
    else:
        listed.write_bytes(listed.read_bytes()[:100])
    if broken == "an upload cut off":
        newer = checkpoints / "checkpoint_2999-01-01_00-00-00.000000"
        newer.mkdir()
        (newer / "state.pt").write_bytes((last / "state.pt").read_bytes()[:1000])
    before = {path: path.stat().st_mtime_ns for path in copy.glob("dynamics/*/*")}
    result = train.run_train(digits_config(copy, *overrides), RunDir(str(copy)))
    assert result.epochs == 3
    assert {path: path.stat().st_mtime_ns for path in copy.glob("dynamics/*/*")} == before


def test_an_intact_list_of_checkpoints_is_kept(tmp_path):
    (tmp_path / "checkpoint_1").mkdir()
    for content, is_kept in (
        (b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}', True),
        (b'{"checkpoint_results": []}', True),
        (b'{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}', False),
        (b'{"checkpoint_results": [{}]}', False),
        (b'{"checkpoint_res', False),
        (b"", False),
    ):
        (tmp_path / ray_train.SNAPSHOT_FILE).write_bytes(content)
        ray_train._drop_broken_snapshot(str(tmp_path))
        assert (tmp_path / ray_train.SNAPSHOT_FILE).exists() == is_kept, content


def test_records_deleted_after_training_are_an_error(tmp_path):
    run_dir = RunDir(str(tmp_path))
    write_trained(run_dir, 200, num_epochs=3)
    train._check_records(run_dir, 198, 3)
    sorted(tmp_path.glob("dynamics/epoch=001/*"))[0].unlink()
    with pytest.raises(RuntimeError, match=r"epoch=001 has \d+ records for 198 samples.*delete .*train and .*dynamics"):
        train._check_records(run_dir, 198, 3)


@pytest.mark.slow
def test_records_equal_a_plain_loop_that_keeps_every_logit(ray_cluster, tmp_path):
    """With one worker, every sample must also be recorded once an epoch."""
    overrides = ("train.num_workers=1", "train.cpus_per_worker=1", "train.batch_size=64")
    run(tmp_path, *overrides)
    config = digits_config(tmp_path, *overrides)
    images = np.repeat(digit_images(NUM_SAMPLES)[0][EMBEDDED][..., None], 3, axis=3)
    augment = Augmenter(config.train, config.seed, images.shape[1])
    torch.manual_seed(init_seed(config.seed))
    model = build_proxy_model("small_cnn", 10).to(memory_format=torch.channels_last)
    see = lambda rows, epoch: augment(torch.from_numpy(images[rows]), EMBEDDED[rows], epoch)  # noqa: E731
    logits, targets = _plain_logits(config, model, see)
    for epoch in range(2):
        probs = torch.softmax(torch.from_numpy(logits[epoch]).double(), 1).numpy()
        onehot = np.eye(10)[targets]
        rows = records(tmp_path, epoch)
        np.testing.assert_array_equal(rows["sample_id"], EMBEDDED)
        np.testing.assert_allclose(rows["target_prob"], (probs * onehot).sum(1), atol=1e-6)
        np.testing.assert_allclose(rows["max_other_prob"], (probs * (1 - onehot)).max(1), atol=1e-6)
        np.testing.assert_allclose(rows["el2n"], np.linalg.norm(onehot - probs, axis=1), atol=1e-6)


@pytest.mark.slow
def test_two_linear_workers_record_what_a_plain_loop_keeps(ray_cluster, tmp_path):
    overrides = ("train.network=linear", "train.num_workers=2", "train.cpus_per_worker=1", "train.batch_size=64")
    result = run(tmp_path, *overrides)
    assert (result.rows, result.reading) == (len(EMBEDDED), "embeddings")
    config = digits_config(tmp_path, *overrides)
    files = RunDir(str(tmp_path)).table_files("embeddings")
    embeddings = torch.from_numpy(np.concatenate([matrix_of(pq.read_table(path), "embedding") for path in files]))
    torch.manual_seed(init_seed(config.seed))
    model = nn.Linear(64, 10)
    logits, targets = _plain_logits(config, model, lambda rows, epoch: 16 * embeddings[rows].float())
    for epoch in range(2):
        rows = records(tmp_path, epoch)
        order = np.argsort(rows["sample_id"])
        np.testing.assert_array_equal(rows["sample_id"][order], EMBEDDED)
        probs = torch.softmax(torch.from_numpy(logits[epoch]), 1).numpy()[np.arange(len(targets)), targets]
        np.testing.assert_allclose(rows["target_prob"][order], probs, atol=1e-5)
    assert result.history[-1]["accuracy"] > 0.85


@pytest.mark.slow
def test_a_diverged_loss_stops_at_once_with_epoch_step_and_learning_rate(ray_cluster, tmp_path):
    overrides = ("train.lr=1e9", "train.num_workers=2", "train.cpus_per_worker=1", "train.max_failures=-1")
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf) at epoch 0, step \d+, learning rate \S+e\+\d"):
        run(tmp_path, *overrides)


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_stops_training_with_its_id(ray_cluster, tmp_path):
    write_clustered(RunDir(str(tmp_path)), 200)
    path = sorted((tmp_path / "proxy_images").iterdir())[1]
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(1, "image", [[b"broken", *rows["image"].to_pylist()[1:]]]), path)
    overrides = ("train.reading=streamed", "train.num_workers=1", "train.cpus_per_worker=1", "train.max_failures=-1")
    with pytest.raises(RuntimeError, match=f"sample_id 150 in {path} cannot be decoded"):
        train.run_train(digits_config(tmp_path, *overrides), RunDir(str(tmp_path)))


def test_a_resumed_run_keeps_its_choice_of_reading(ray_cluster, tmp_path, monkeypatch):
    run_dir, config = RunDir(str(tmp_path)), digits_config(tmp_path)
    assert train._choose_reading(config, run_dir, 1000) == "memory"
    monkeypatch.setattr(proxy_reader, "MAX_STORE_SHARE", 0.0)
    assert train._choose_reading(config, run_dir, 1000) == "memory"
    assert train._choose_reading(config, RunDir(str(tmp_path / "other")), 1000) == "streamed"
    resized = digits_config(tmp_path, "train.augmentation=resized_crop_flip")
    monkeypatch.undo()
    assert train._choose_reading(resized, RunDir(str(tmp_path / "third")), 1000) == "streamed"


@pytest.mark.slow
@pytest.mark.parametrize("override", ["train.precision=bf16", "train.precision=fp16", "train.compile=true"])
def test_every_precision_and_a_compiled_network_learn(ray_cluster, tmp_path, override):
    result = run(tmp_path, "train.epochs=3", "train.cpus_per_worker=1", override)
    assert result.history[-1]["accuracy"] > 0.8
    assert all(np.isfinite(records(tmp_path, epoch)["el2n"]).all() for epoch in range(3))


@pytest.mark.slow
def test_the_metrics_of_the_last_epoch_reach_the_exporter_of_ray(ray_cluster, tmp_path):
    """The exporter hears of a worker every 10 s, so the training has to take longer."""
    write_clustered(RunDir(str(tmp_path)), NUM_SAMPLES)
    config = digits_config(tmp_path, "train.epochs=600", "train.cpus_per_worker=1")
    training = threading.Thread(target=train.run_train, args=(config, RunDir(str(tmp_path))))
    training.start()
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    exported = ""
    while training.is_alive() and "elfs_train_loss" not in exported:
        time.sleep(1)
        with urllib.request.urlopen(address, timeout=5) as answer:
            exported = answer.read().decode()
    training.join()
    for name in ("epoch", "loss", "accuracy", "images_per_s", "data_wait_share", "recorder_share"):
        assert re.search(rf"^ray_elfs_train_{name}{{.*}} \d", exported, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_group_that_grows_and_shrinks_records_every_sample(tmp_path):
    """On a cluster of its own, in a process of its own: nodes are added and killed on the way."""
    write_clustered(RunDir(str(tmp_path)), NUM_SAMPLES)
    history = run_script(Path(__file__).with_name("elastic_train.py"), tmp_path)["history"]
    workers = [metrics["workers"] for metrics in history]
    assert workers[0] == workers[-1] == 1 and 2 in workers
    for epoch in range(len(workers)):
        np.testing.assert_array_equal(np.sort(records(tmp_path, epoch)["sample_id"]), EMBEDDED)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_notice_within_an_epoch_costs_no_step_and_changes_no_byte(tmp_path):
    """On a cluster of its own, in a process of its own: a node is drained, and killed when its time is up."""
    counts = run_script(Path(__file__).with_name("spot_train.py"), "train", "noticed", tmp_path)
    assert (counts["steps"], counts["repeated_steps"]) == (3 * -(-len(EMBEDDED) // 10), 0)
    assert contents(tmp_path / "spot", "dynamics") == contents(tmp_path / "undisturbed", "dynamics")
    assert weights(tmp_path / "spot") == weights(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_lost_with_what_all_workers_read_changes_no_byte(tmp_path):
    """The workers hold all CPUs of the next node, so that Ray has none to restore what was lost."""
    counts = run_script(Path(__file__).with_name("spot_train.py"), "train", "unnoticed", tmp_path)
    assert counts["steps"] == 3 * -(-len(EMBEDDED) // 10) and counts["repeated_steps"] > 0
    assert contents(tmp_path / "spot", "dynamics") == contents(tmp_path / "undisturbed", "dynamics")
    assert weights(tmp_path / "spot") == weights(tmp_path / "undisturbed")


def _plain_logits(
    config: Config, model: nn.Module, see: Callable[[np.ndarray, int], torch.Tensor]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Train in a plain loop. Returns the logits of every sample in each epoch, by ascending sample_id, and the targets.

    `see` returns the model's inputs for some rows in an epoch.
    """
    targets = digit_images(NUM_SAMPLES)[1][EMBEDDED]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    num_steps = -(-len(targets) // 64)
    torch.set_num_threads(1)
    kept = []
    for epoch in range(2):
        order = epoch_order(len(targets), config.seed, epoch)
        logits = np.empty((len(targets), 10), np.float32)
        for step in range(num_steps):
            rows = order[step * 64 : (step + 1) * 64]
            progress = (epoch * num_steps + step) / (2 * num_steps)
            optimizer.param_groups[0]["lr"] = 1e-4 + (0.1 - 1e-4) * 0.5 * (1 + np.cos(np.pi * progress))
            output = model(see(rows, epoch))
            logits[rows] = output.detach().numpy()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(output, torch.from_numpy(targets[rows])).backward()
            optimizer.step()
        kept.append(logits)
    return kept, targets


def _epochs_done(folder: Path) -> int:
    return len(list((folder / "train").glob("history/epoch=*.json")))


def _wait_until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Killer:
    """Kills a training worker of this process's Ray once an epoch is complete, with SIGKILL."""

    def __init__(self, folder: Path, after_epoch: int):
        self._folder, self._after_epoch = folder, after_epoch
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self.epochs_done: int | None = None

    def __enter__(self) -> "_Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=1)

    def _kill(self) -> None:
        _wait_until(lambda: _epochs_done(self._folder) > self._after_epoch)
        time.sleep(0.3)
        workers = training_worker_pids()
        os.kill(workers[-1], signal.SIGKILL)
        self.epochs_done = _epochs_done(self._folder)
