"""Run scripts of the tests in processes of their own, each with a Ray cluster of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 380


def run_script(script: Path, *arguments: object) -> Any:
    """Run a script from the root of the checkout; return the JSON in the last line that it prints."""
    ended = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])
