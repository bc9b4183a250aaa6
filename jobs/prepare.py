"""Turn a published benchmark into pools: the command `elfs-ray prepare`."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
