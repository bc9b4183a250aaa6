"""Select again from a finished run: `elfs-ray reselect`, for `ray job submit`."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["reselect", *sys.argv[1:]]))
