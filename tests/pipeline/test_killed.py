"""Commands that are killed and typed again: a pool that changes, near-duplicates, and a next round of labels."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tables import contents, digit_images, png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TABLES = ("index", "gone", "embeddings", "rejected", "neighbors", "duplicates", "clusters", "coreset")
IMAGES = [png(image) for image in digit_images(200)[0]]
COPIES = {3: 190, 60: 191, 150: 192}  # the pool has these images twice, under a second number
# Where the driver of a changed pool is stopped, one after the other in the same run directory: once this function of
# this module has returned.
STOPS_OF_UPDATE = (
    ("elfs_ray.stages.index.run", "write_gone", "SIGKILL"),
    ("elfs_ray.pipeline.runner", "remove_stage", "SIGKILL"),
    ("elfs_ray.stages.duplicates.run", "_edges", "SIGINT"),
    ("elfs_ray.stages.duplicates.run", "_examples", "SIGKILL"),
    ("elfs_ray.stages.select.run", "score_by_coverage", "SIGKILL"),
    ("elfs_ray.stages.select.run", "write_coresets", "SIGINT"),
)
STOPS_OF_ROUND = (("elfs_ray.stages.select.run", "find_left_out", "SIGKILL"), *STOPS_OF_UPDATE[-2:])
EXIT_CODES = {"SIGKILL": -9, "SIGINT": 130}
STOP = """
import importlib, os, signal, sys
place, name, how, *arguments = sys.argv[1:]
module = importlib.import_module(place)
function = getattr(module, name)

def work_and_stop(*arguments, **keys):
    result = function(*arguments, **keys)
    os.kill(os.getpid(), getattr(signal, how))
    return result

setattr(module, name, work_and_stop)
from elfs_ray.commands import main
sys.exit(main(arguments))
"""


@pytest.fixture
def address(ray_cluster) -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def write_images(pool: Path, numbers: range) -> None:
    pool.mkdir(exist_ok=True)
    originals = {copy: original for original, copy in COPIES.items()}
    for number in numbers:
        (pool / f"{number:03d}.png").write_bytes(IMAGES[originals.get(number, number)])


def command(pool: Path, run_dir: Path, address: str) -> list[str]:
    keys = ["embed.encoder=pixels", "embed.image_size=8", "embed.block_images=32", "duplicates.threshold=0.999"]
    keys += ["cluster.num_clusters=5", "cluster.num_workers=1", "embed.num_workers=1"]
    return ["select", str(pool), "--budget", "40", f"run_dir={run_dir}", f"ray_address={address}", *keys]


def type_in(arguments: list[str], *stop: str) -> subprocess.CompletedProcess:
    """Run a command, stopped where `stop` says."""
    start = ["-c", STOP, *stop] if stop else ["-m", "elfs_ray"]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=200)


def complete(arguments: list[str]) -> None:
    ended = type_in(arguments)
    assert ended.returncode == 0, ended.stderr


def stop_and_complete(arguments: list[str], stops: tuple[tuple[str, str, str], ...]) -> None:
    for stop in stops:
        ended = type_in(arguments, *stop)
        assert ended.returncode == EXIT_CODES[stop[2]], (stop, ended.stderr)
    complete(arguments)


def test_a_changed_pool_ends_the_same_however_often_it_is_killed(address, tmp_path):
    pool, run_dir, undisturbed = tmp_path / "pool", tmp_path / "run", tmp_path / "undisturbed"
    write_images(pool, range(120))
    complete(command(pool, run_dir, address))
    shutil.copytree(run_dir, undisturbed)
    write_images(pool, range(120, 193))
    for number in (0, 7, 60):  # image 60 is back as 191
        (pool / f"{number:03d}.png").unlink()
    complete(command(pool, undisturbed, address))
    stop_and_complete(command(pool, run_dir, address), STOPS_OF_UPDATE)
    tables = contents(run_dir, *TABLES)
    assert tables == contents(undisturbed, *TABLES)
    assert {name.partition("/")[0] for name in tables} >= {*TABLES} - {"rejected"}
    assert (run_dir / "coreset.txt").read_bytes() == (undisturbed / "coreset.txt").read_bytes()
    assert "nothing to do" in type_in(command(pool, run_dir, address)).stderr


def test_a_second_round_ends_the_same_however_often_it_is_killed(address, tmp_path):
    pool, run_dir = tmp_path / "pool", tmp_path / "run"
    write_images(pool, range(100))
    complete(command(pool, run_dir, address))
    shutil.copytree(run_dir, tmp_path / "undisturbed")
    labelled = shutil.copy(run_dir / "coreset.txt", tmp_path / "labelled.txt")

    def second_round(folder: Path) -> list[str]:
        return ["reselect", str(folder), "name=second", "budget=20", f"select.labelled={labelled}"]

    complete([*second_round(tmp_path / "undisturbed"), f"ray_address={address}"])
    stop_and_complete([*second_round(run_dir), f"ray_address={address}"], STOPS_OF_ROUND)
    written = contents(run_dir, "coresets")
    assert written == contents(tmp_path / "undisturbed", "coresets") and "coresets/second/coreset.txt" in written
    first, second = (set(path.read_text().splitlines()) for path in (labelled, run_dir / "coresets/second/coreset.txt"))
    assert len(second) == 20 and not first & second
