"""Train in the command's own process: the bytes of Ray Train with one worker, and errors, kills, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import elfs_ray
from elfs_ray.config import load_config
from elfs_ray.evaluation import run as evaluation
from elfs_ray.evaluation.workload import load
from elfs_ray.methods.training.dynamics import DynamicsRecorder
from elfs_ray.runtime import cluster
from elfs_ray.stages.training import checkpoints
from elfs_ray.storage import filesystem
from tests.in_process import run_here, without_ray
from tests.tables import contents, digit_images, png

NUM_POOL, NUM_TEST = 150, 40
KEYS = (
    *("budget=30", "pool.label=folder", "embed.image_size=8", "embed.proxy_image_size=8", "embed.num_workers=1"),
    *("cluster.num_clusters=10", "cluster.num_workers=2", "select.method=double_end", "select.hard_fraction=0.2"),
    *("train.network=small_cnn", "train.epochs=4", "train.batch_size=40", "train.augmentation=crop"),
    *("train.crop_padding=1", "train.max_failures=0"),
)
# Every trainer.
ALL_TRAIN = (
    *("embed.encoder=self_supervised", "pretrain.profile=cpu", "pretrain.epochs=2", "pretrain.batch_size=40"),
    *("cluster.method=temi", "cluster.temi.profile=cpu", "cluster.temi.num_epochs=2", "cluster.temi.batch_size=32"),
    "select.hard_fraction=search",
    *("select.search_step=0.5", "select.search_iterations=3"),
)
SCRIPT = """
import sys
from elfs_ray.cli import report_errors
from elfs_ray.config import load_config
from elfs_ray.pipeline import runner

sys.exit(report_errors(lambda: runner.run(load_config(None, sys.argv[1:]))))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder with folders pool/ and test/ of digits, a folder for each label."""
    folder = tmp_path_factory.mktemp("images")
    for number, (image, label) in enumerate(zip(*digit_images(NUM_POOL + NUM_TEST), strict=True)):
        place = folder / ("pool" if number < NUM_POOL else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(png(image))
    return folder


def overrides(images: Path, run_dir: Path, *more: str) -> list[str]:
    return [f"pool.uri={images / 'pool'}", f"run_dir={run_dir}", "embed.encoder=pixels", *KEYS, *more]


def checkpoint(run_dir: Path, folder: str) -> dict:
    (path,) = (run_dir / folder).glob("checkpoint_*/state.pt")
    return torch.load(path, weights_only=True)


def tensors(state: object) -> list[bytes]:
    """Return the bytes of every tensor of a checkpoint."""
    if isinstance(state, torch.Tensor):
        return [state.contiguous().numpy().tobytes()]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [each for value in values for each in tensors(value)]


@pytest.mark.slow
def test_all_trainings_have_the_bytes_of_ray_train(ray_cluster, images, tmp_path, monkeypatch):
    # With as many threads as the workers of Ray Train, which take all CPUs of the cluster: sums round differently with
    # another number.
    num_cpus = cluster.num_cpus()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(num_cpus))
    elfs_ray.run(load_config(None, overrides(images, tmp_path / "ray", *ALL_TRAIN)))
    run_here(monkeypatch, load_config(None, overrides(images, tmp_path / "here", *ALL_TRAIN)))
    tables = ("index", "proxy_images", "embeddings", "neighbors", "clusters", "dynamics", "scores", "coreset")
    assert contents(tmp_path / "here", *tables) == contents(tmp_path / "ray", *tables)
    for trainer in ("pretrain/checkpoints", "cluster/temi", "train/checkpoints"):
        in_ray, in_process = (checkpoint(tmp_path / name, trainer) for name in ("ray", "here"))
        assert tensors(in_process) == tensors(in_ray), trainer
        assert in_process.keys() == in_ray.keys()


@pytest.mark.slow
def test_an_evaluation_has_the_accuracies_of_one_on_ray(ray_cluster, images, tmp_path, monkeypatch):
    run_dir = run_here(monkeypatch, load_config(None, overrides(images, tmp_path / "run", "select.hard_fraction=0.2")))
    keys = [f"runs=[{run_dir.uri}]", f"test_uri={images / 'test'}", "budgets=[30]", "num_seeds=2", "num_tests=2"]
    keys += ["network=small_cnn", "iterations=6", "batch_size=16", "methods=[elfs,random,badge,aum_ccs]"]
    accuracies = {}
    for name in ("ray", "here"):
        with without_ray(monkeypatch, tmp_path) if name == "here" else nullcontext():
            evaluation.run(load([*keys, f"out={tmp_path / name}", "ray_address=local"]))
        paths = sorted((tmp_path / name / "trials").glob("*.json"))
        accuracies[name] = {path.name: json.loads(path.read_text()) for path in paths}
    assert accuracies["here"] == accuracies["ray"] and len(accuracies["ray"]) == 8


def test_a_training_stopped_in_an_epoch_resumes_to_the_same_bytes(images, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_REPORT_SHARE", 1.0)  # every epoch is saved, however short
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run_here(monkeypatch, load_config(None, overrides(images, undisturbed)))
    before, calls = DynamicsRecorder.add, []

    def stop(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 10:  # the second step of the third epoch
            raise KeyboardInterrupt
        before(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DynamicsRecorder, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, load_config(None, overrides(images, stopped)))
        torch.manual_seed(7)  # whatever a process has done with torch's generator before
        assert checkpoint(stopped, "train/checkpoints")["next_epoch"] == 2
        run_here(monkeypatch, load_config(None, overrides(images, stopped)))
    assert len(calls) == 10 + 2 * 4
    tables = ("dynamics", "scores", "coreset")
    assert contents(stopped, *tables) == contents(undisturbed, *tables)
    assert tensors(checkpoint(stopped, "train/checkpoints")) == tensors(checkpoint(undisturbed, "train/checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_at_once_with_nothing_half_written(images, tmp_path, signal_number, code):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, *overrides(images, run_dir, "train.epochs=100000", "ray_address=local")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        while not list((run_dir / "dynamics").glob("epoch=003/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal_number)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == code and "stopped in stage train" in stderr
    assert not [path for path in run_dir.rglob("*") if filesystem.is_half_written(path.name)]
    assert checkpoint(run_dir, "train/checkpoints")["next_epoch"] >= 2
