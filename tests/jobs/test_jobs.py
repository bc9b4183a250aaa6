"""Jobs as a person types them: --help, --dry-run, errors and their exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elfs_ray.config import describe_keys, load_config
from tests.tables import digit_images, png

JOBS = Path(__file__).parent.parent.parent / "jobs"
PIPELINE_JOBS = ("imagenet", "cifar10", "cifar100", "stl10", "cinic10")


def type_job(name: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(JOBS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)


@pytest.fixture
def pool(tmp_path) -> Path:
    images, _ = digit_images(40)
    (tmp_path / "pool").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "pool" / f"{number}.png").write_bytes(png(image))
    return tmp_path / "pool"


@pytest.mark.parametrize("name", PIPELINE_JOBS)
def test_every_yaml_holds_the_settings_of_the_paper(name):
    config = load_config(JOBS / f"{name}.yaml", ["run_dir=/run", "pool.uri=/pool"])
    imagenet = name == "imagenet"
    assert config.train.network == ("resnet34" if imagenet else "resnet18")
    assert config.train.epochs == (60 if imagenet else 200)
    assert (config.train.batch_size, config.train.lr, config.train.min_lr) == (256, 0.1, 1e-4)
    assert config.train.weight_decay == (1e-4 if imagenet else 5e-4)
    assert config.cluster.num_clusters == {"imagenet": 1000, "cifar100": 100}.get(name, 10)


@pytest.mark.parametrize("name", [*PIPELINE_JOBS, "quickstart"])
def test_help_lists_every_key_with_its_default(name):
    result = type_job(name, "--help")
    assert result.returncode == 0
    assert all(key in result.stdout for key, _, _ in describe_keys())
    assert "default: required" in result.stdout or name == "quickstart"


def test_dry_run_prints_the_plan_and_does_nothing(pool, tmp_path):
    arguments = [f"pool.uri={pool}", f"run_dir={tmp_path / 'run'}", "embed.encoder=pixels", "embed.num_workers=2"]
    result = type_job("cifar10", "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert "40 images" in result.stdout and "resnet18, 200 epochs" in result.stdout
    assert "4 images (10.00%)" in result.stdout
    assert "2 encoders of 1 CPU, tasks of 1 CPU" in result.stdout and "GPU" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_refused_by_the_dry_run(pool, tmp_path):
    arguments = [f"pool.uri={pool}", f"run_dir={tmp_path / 'run'}", "embed.encoder=pixels", "ray_address=local"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = type_job("cifar10", "--dry-run", "train.device=cuda", *arguments, env=environment)
    assert result.returncode == 2
    assert "train.device=cuda, but there is no GPU of this machine" in result.stderr


def test_help_that_is_cut_short_by_its_reader_is_no_error():
    command = f"{sys.executable} {JOBS / 'imagenet.py'} --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["train.epoch=3"], "did you mean train.epochs"),
        (["--fast"], "unknown option --fast"),
        ([], "no value for pool.uri, run_dir"),
        (["pool.uri=/tmp", "run_dir=/tmp/none", "embed.encoder=swav_resnet50"], "embed.encoder=swav_resnet50: "),
        (["pool.uri=/no/such/place", "run_dir=/tmp/none", "embed.encoder=pixels"], "does not exist"),
    ],
)
def test_a_bad_command_ends_with_one_message_and_exit_code_2(arguments, needed):
    result = type_job("cifar10", *arguments)
    assert result.returncode == 2
    assert needed in result.stderr and "Traceback" not in result.stderr
