"""Choose a coreset of CINIC10 with the paper's settings."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["select", "--preset=cinic10", *sys.argv[1:]]))
