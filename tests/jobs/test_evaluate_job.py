"""`elfs-ray evaluate` on the command line; tests/evaluation has what it does."""

import subprocess
import sys
from pathlib import Path

from elfs_ray.config import describe_keys
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.methods import METHODS

JOB = Path(__file__).parent.parent.parent / "jobs" / "evaluate.py"


def type_job(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, timeout=100)


def test_help_lists_every_key_and_method():
    result = type_job("--help-all")
    assert result.returncode == 0, result.stderr
    assert all(key in result.stdout for key, _, _ in describe_keys(kind=EvaluateRunsConfig))
    assert all(method in result.stdout for method in METHODS)


def test_a_bad_command_ends_with_one_message_and_exit_code_2():
    result = type_job("--dry-run", "runs=[/no/such/run]", "out=/no/out", "test_uri=/no/test")
    assert result.returncode == 2
    assert "no complete stage select: run the pipeline there first" in result.stderr
    assert "Traceback" not in result.stderr
