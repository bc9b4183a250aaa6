"""The tools themselves import the exports: the same images, in the same order, with their metadata.

`make test-export` installs the tools into an environment of their own, .venv/export, and runs these tests.
"""

import csv
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from elfs_ray.handover.export import export
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.storage.run_dir import RunDir
from tests.handover.runs import list_pool, write_run

pytestmark = [pytest.mark.exporters, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("ELFS_RAY_EXPORT_PYTHON", ROOT / ".venv" / "export" / "bin" / "python"))
IDS = [11, 3, 8, 0, 5]


@pytest.fixture
def run_dir(tmp_path, photographs):
    """Return a run on twelve parts of photographs, whose names have spaces and signs."""
    for number in range(12):
        path = tmp_path / "share" / "my photos" / f"part #{number}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        left = 20 * number
        photographs[number % 2].crop((left, 0, left + 100, 80)).save(path)
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(tmp_path / "share"), IDS)
    return run_dir


def import_with(tool, path, tmp_path):
    """Return what importers.py prints: a list of images."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is missing: make test-export installs the tools there")
    environment = os.environ | {"SHARE": str(tmp_path / "share"), "LABELS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [PYTHON, Path(__file__).with_name("importers.py"), tool, path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("tool", ["webdataset", "huggingface", "fiftyone", "cvat", "label-studio"])
def test_a_tool_imports_the_same_images_in_the_same_order(tool, run_dir, tmp_path):
    root = {"cvat": tmp_path / "share", "label-studio": tmp_path}.get(tool)
    images = import_with(tool, export(run_dir, tool, root=root and str(root)), tmp_path)
    rows = list(csv.DictReader(Path(export(run_dir, "csv")).read_text().splitlines()))
    assert [image["sha256"] for image in images] == [
        hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest() for row in rows
    ]
    for name in ("sample_id", "rank", "pseudo_label", "score", "similarity"):
        expected = [float(row[name]) if row[name] else None for row in rows]
        assert [image[name] for image in images] == [
            value if value is None else pytest.approx(value, abs=1e-4) for value in expected
        ]
    if tool == "label-studio":
        for kind in ("JSON", "JSON_MIN"):
            path = str(tmp_path / f"{kind}.json")
            assert sorted(read_named_images("select.labelled", path, run_dir)) == sorted(IDS[:2])
