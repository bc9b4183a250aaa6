"""benchmarks/gpu_rehearsal.py in small: the settings for a GPU are valid, and no part is predicted below its least."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_rehearsal.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_of_step_runs_and_takes_less_than_was_predicted():
    ended = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    parts = list(dict.fromkeys(line["part"] for line in lines))
    assert parts == ["encoder", "clusters", "proxy", "pruned_90", "pruned_70", "rates"]
    for part in parts:
        of_part = [line for line in lines if line["part"] == part]
        assert 0 < sum(line["least_s_h100"] for line in of_part) < of_part[0]["part_predicted_s"]
