"""torchvision's compiled operators: found under each of their names, and usable or declared, never both."""

import subprocess
import sys

import pytest

from elfs_ray.methods.training.torchvision_compat import find_extensions


@pytest.mark.parametrize("name", ["_C.so", "_C_stable.so", "_C.abi3.so"])
def test_operators_are_found_under_the_name_of_every_version(tmp_path, name):
    for other in ("image.so", "image_stable.so", "_internally_replaced_utils.py", "__init__.py", name):
        (tmp_path / other).touch()
    assert [path.name for path in find_extensions(tmp_path)] == [name]


@pytest.mark.slow
def test_torchvision_is_importable_with_or_without_its_operators():
    """In a process of its own, as an operator that is declared twice ends it."""
    code = "from elfs_ray.methods.training import torchvision_compat; import torchvision; torchvision.models.resnet18()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
