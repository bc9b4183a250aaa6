"""`elfs-ray prepare` on the command line: its keys, its errors, and the command that it prints at the end."""

import subprocess
import sys
from pathlib import Path

import pytest

from elfs_ray.cli import read_arguments
from elfs_ray.commands import select
from elfs_ray.commands.prepare import describe, main
from elfs_ray.datasets.benchmarks import BENCHMARKS
from elfs_ray.datasets.prepare import prepare
from tests.datasets.layouts import BUILD
from tests.jobs.test_jobs import JOBS, type_command


def command_of(tmp_path: Path) -> list[str]:
    """Return the command that the job prints after it has made the pools of a small CIFAR10."""
    built = BUILD["cifar10"]("cifar10", tmp_path / "published")
    facts = prepare(built.benchmark, str(built.archive), tmp_path / "pools" / "cifar10")
    return describe(built.benchmark, facts, tmp_path / "pools" / "cifar10").splitlines()[-1].split()


def test_the_printed_command_names_a_job_and_keys_that_it_accepts(tmp_path):
    script, *arguments = command_of(tmp_path)
    config = select.load(read_arguments(arguments[1:], select.KEYS, "pool.uri"))
    assert (script, arguments[0]) == ("elfs-ray", "select") and config.train.network == "resnet18"
    assert Path(config.pool.uri).is_dir() and Path(str(config.evaluate.test_uri)).is_dir()
    result = type_command(*arguments, "--dry-run", "embed.encoder=pixels", "ray_address=local")
    assert result.returncode == 0 and "200 images" in result.stdout, result.stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_source_is_refused_with_the_page_that_has_it(name, tmp_path):
    with pytest.raises(ValueError, match="no source for") as error:
        main([f"dataset={name}", f"out={tmp_path / name}"])
    assert BENCHMARKS[name].page in str(error.value)
    assert all(archive.name in str(error.value) for archive in BENCHMARKS[name].archives)
    assert ("source=download" in str(error.value)) == (name != "imagenet")


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["dataset=mnist"], "must be one of cifar10, cifar100"),
        ([], "must be one of"),
        (["dataset=cifar10", "folder=x"], "must be dataset=..., source=..."),
        (["cifar10", "stl10"], "dataset is set already"),
        (["dataset=cifar10", "source=x", "out=s3://bucket/x"], "copy it to the bucket"),
        (["--fast", "dataset=cifar10"], "unknown option --fast"),
    ],
)
def test_a_bad_command_is_refused(arguments, needed):
    with pytest.raises(ValueError, match=needed):
        main(arguments)


def test_a_wrong_archive_ends_with_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut short")
    command = [sys.executable, str(JOBS / "prepare.py"), "dataset=cifar10", "source=cifar-10-python.tar.gz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert result.returncode == 2 and "cut short, damaged or another file" in result.stderr
    assert "Traceback" not in result.stderr and {path.name for path in tmp_path.rglob("*")} <= {
        "cifar-10-python.tar.gz",
        "pools",
    }
