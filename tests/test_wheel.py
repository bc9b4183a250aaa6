"""The wheel has the command and its presets, away from any clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from elfs_ray.presets import NAMES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return a folder into which the wheel of these sources is installed."""
    sources, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("elfs_ray", "jobs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", sources / "dist", ".", cwd=sources)
    (wheel,) = (sources / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0].partition("-")[0] for name in archive.namelist()} == {"elfs_ray"}
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=sources)
    return site


def test_the_command_of_the_wheel_knows_every_preset(site, tmp_path):
    for name in NAMES:
        said = run(
            site / "bin" / "elfs-ray", "select", "--preset", name, "--help-all", cwd=tmp_path, PYTHONPATH=str(site)
        )
        assert f"defaults below are those of {name}.yaml" in said
    where = run(
        sys.executable, "-c", "import elfs_ray; print(elfs_ray.preset('photos'))", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert where.startswith(str(site))


def test_an_installed_package_is_found_in_the_folder_above_a_clone(site, tmp_path):
    """The clone's own folder has the package's name, and counts as a package of its own where nothing is installed."""
    (tmp_path / "elfs_ray" / "elfs_ray").mkdir(parents=True)
    said = run(sys.executable, "-m", "elfs_ray", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "elfs-ray select photos --budget 200" in said
