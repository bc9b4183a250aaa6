"""Compare the coresets of finished runs with baselines: `elfs-ray evaluate`, for `ray job submit`."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
