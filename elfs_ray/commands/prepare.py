"""Turn a published benchmark into pools: cifar10, cifar100, stl10, cinic10 or imagenet.

The publisher's archives are checked by MD5, the splits and classes by their numbers of images. The pools are Parquet
with the columns image (bytes of an image file) and label. They get their names only when they are complete; after an
interruption, type the same command again.

    elfs-ray prepare cifar10 source=cifar-10-python.tar.gz
    elfs-ray select pools/cifar10/train --preset=cifar10 pool.label=label evaluate.test_uri=pools/cifar10/test \\
      run_dir=runs/cifar10
"""

from pathlib import Path

from elfs_ray.cli import read_arguments
from elfs_ray.config import ConfigError
from elfs_ray.datasets.benchmarks import BENCHMARKS, TEST, TRAIN, Benchmark, SourceError
from elfs_ray.datasets.prepare import Facts, find_finished, prepare
from elfs_ray.datasets.source import DOWNLOAD
from elfs_ray.runtime.progress import count

KEYS = {
    "dataset": f"one of {', '.join(BENCHMARKS)}",
    "source": f"the publisher's archive, the folder it unpacks to, or {DOWNLOAD}, which keeps the archive next to out",
    "out": "folder for the pools on this machine (default pools/<dataset>), from where you can copy them to a bucket",
}


def help_text() -> str:
    """Return the text of --help: the keys, and what each benchmark needs."""
    lines = [str(__doc__), "usage: elfs-ray prepare DATASET source=download [--dry-run] [key=value ...]", ""]
    lines += ["--dry-run  print what would be written, do nothing", ""]
    lines += [f"{key:<8} {meaning}" for key, meaning in KEYS.items()] + [""]
    lines += [f"{name:<8} {benchmark.valid_sources}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join(lines)


def read_keys(overrides: list[str]) -> tuple[Benchmark, str | None, Path]:
    """Return (benchmark, source, out). Raises ConfigError for an unknown key or benchmark, and for a bucket as out."""
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    if len(values) < len(overrides) or not values.keys() <= KEYS.keys():
        raise ConfigError(f"{' '.join(overrides)}: arguments must be dataset=..., source=... and optionally out=...")
    if values.get("dataset") not in BENCHMARKS:
        raise ConfigError(f"dataset={values.get('dataset', '')} must be one of {', '.join(BENCHMARKS)}")
    out = values.get("out") or f"pools/{values['dataset']}"
    if "://" in out:
        raise ConfigError(f"out={out} must be a folder on this machine: give one, then copy it to the bucket")
    return BENCHMARKS[values["dataset"]], values.get("source") or None, Path(out).expanduser()


def describe(benchmark: Benchmark, facts: Facts | None, out: Path) -> str:
    """Return a line for each pool and, once they are written (facts is not None), the command that uses them."""
    lines = [
        f"{split:<6} {count(known.num_images, 'image')} of {benchmark.num_classes:,} classes  {out / split}"
        for split, known in benchmark.splits.items()
    ]
    if facts is not None:
        lines.append(
            f"elfs-ray select {out / TRAIN} --preset={benchmark.name} pool.label=label "
            f"evaluate.test_uri={out / TEST} run_dir=runs/{benchmark.name}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prepare a benchmark, or say what would be done."""
    typed = read_arguments(arguments, KEYS, positional="dataset")
    if typed.help:
        print(help_text())
        return
    benchmark, source, out = read_keys(typed.overrides)
    try:
        facts = find_finished(benchmark, out)
        if facts is None and source is None:
            raise ConfigError(f"no source for {benchmark.name}; give {benchmark.valid_sources}")
        if source is not None and not typed.dry_run:
            facts = prepare(benchmark, source, out)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    print(describe(benchmark, facts, out))
