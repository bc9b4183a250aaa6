"""Run `python -m elfs_ray`, which is the command `elfs-ray`."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main())
