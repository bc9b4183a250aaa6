"""Choose which of your own images to label: minutes on CPUs, without training and without a download."""

import sys
from pathlib import Path

from elfs_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, Path(__file__).with_suffix(".yaml")))
