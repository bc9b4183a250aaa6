"""Choose which of your own images to label: `elfs-ray select`, for `ray job submit`."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["select", "--preset=photos", *sys.argv[1:]]))
