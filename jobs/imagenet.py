"""Choose a coreset of ImageNet-1K, or of any pool of photographs, with the paper's settings."""

import sys

from elfs_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["select", "--preset=imagenet", *sys.argv[1:]]))
