"""Turn a published benchmark into pools: cifar10, cifar100, stl10, cinic10 or imagenet.

What the owner publishes is checked by MD5 and by the images of each split and class, and written as Parquet: image (the
bytes of an image file), label. Nothing is there under its name before it is whole; the same command goes on.

    python jobs/prepare.py dataset=cifar10 source=cifar-10-binary.tar.gz out=pools/cifar10
    python jobs/cifar10.py pool.uri=pools/cifar10/train pool.label=label run_dir=runs/cifar10 \\
      evaluate.test_uri=pools/cifar10/test
"""

import sys
from pathlib import Path

from elfs_ray.cli import asks_for_help, report_errors, split_arguments
from elfs_ray.config import ConfigError
from elfs_ray.datasets.prepare import DOWNLOAD, Facts, find_finished, prepare
from elfs_ray.datasets.published import BENCHMARKS, TEST, TRAIN, Benchmark, SourceError
from elfs_ray.runtime.progress import count

KEYS = {
    "dataset": f"one of {', '.join(BENCHMARKS)}",
    "source": f"what was published, or {DOWNLOAD}, which puts the archive beside out and goes on where it broke off",
    "out": "folder for the pools, on this machine (default pools/<dataset>); copy it to a bucket from there",
}


def help_text() -> str:
    """The keys, and what each benchmark needs."""
    lines = [str(__doc__), "usage: python jobs/prepare.py [--dry-run] [--help] key=value ...", ""]
    lines += ["--dry-run  say what would be written, do nothing", ""]
    lines += [f"{key:<8} {meaning}" for key, meaning in KEYS.items()] + [""]
    lines += [f"{name:<8} {benchmark.needed().removeprefix('needed: ')}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join(lines)


def read_keys(overrides: list[str]) -> tuple[Benchmark, str | None, Path]:
    """(benchmark, source, out). Raises ConfigError for anything that is no key or no benchmark."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    if len(given) < len(overrides) or not given.keys() <= KEYS.keys():
        raise ConfigError(f"{' '.join(overrides)}: needed are dataset=..., source=... and, if you like, out=...")
    if given.get("dataset") not in BENCHMARKS:
        raise ConfigError(f"dataset={given.get('dataset', '')} is none of {', '.join(BENCHMARKS)}")
    out = given.get("out") or f"pools/{given['dataset']}"
    if "://" in out:
        raise ConfigError(f"out={out} is no folder of this machine: write to one, and copy it to the bucket")
    return BENCHMARKS[given["dataset"]], given.get("source") or None, Path(out).expanduser()


def describe(benchmark: Benchmark, facts: Facts | None, out: Path) -> str:
    """What is, or will be, where, and the command that takes it."""
    lines = [
        f"{split:<6} {count(known.num_images, 'image')} of {benchmark.num_classes:,} classes  {out / split}"
        for split, known in benchmark.splits.items()
    ]
    if facts is not None:
        lines.append(
            f"python jobs/{benchmark.name}.py pool.uri={out / TRAIN} pool.label=label run_dir=runs/{benchmark.name} "
            f"evaluate.test_uri={out / TEST}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if asks_for_help(arguments):
        print(help_text())
        return
    options, overrides = split_arguments(arguments)
    benchmark, source, out = read_keys(overrides)
    try:
        facts = find_finished(benchmark, out)
        if facts is None and source is None:
            raise ConfigError(f"no source for {benchmark.name}; {benchmark.needed()}")
        if source is not None and not options:
            facts = prepare(benchmark, source, out)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    print(describe(benchmark, facts, out))


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:])))
