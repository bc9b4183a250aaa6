"""Choose a coreset of STL10's training images with the paper's settings."""

import sys
from pathlib import Path

from elfs_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, Path(__file__).with_suffix(".yaml")))
