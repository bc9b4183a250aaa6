"""Compare the coresets of finished runs with baselines, by training on each with the true labels.

For every method, budget and seed a linear probe of the embeddings, or a network from scratch (network=...), is tested
on images that no selection has seen. Trainings share the cluster's devices. The same command resumes where it was
stopped, and more methods, budgets or seeds repeat nothing. Example:

    python jobs/evaluate.py runs=[runs/a,runs/b] out=runs/judged test_uri=cifar10/test.parquet pool.label=label \\
      methods=[random,prototypicality,d2,elfs,elfs+score=el2n] budgets=[0.1,0.3]

To evaluate a single run at the end of its own job, give that job evaluate.test_uri=...
"""

import sys

from elfs_ray.cli import asks_for_help, key_lines, print_results, report_errors, split_arguments
from elfs_ray.config import describe_keys
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.workload import describe, load
from elfs_ray.storage.run_dir import RunDir


def help_text() -> str:
    """Return the text of --help: every key with its default."""
    lines = [str(__doc__), "usage: python jobs/evaluate.py [--dry-run] [--help] key=value ...", ""]
    lines += ["--dry-run  check everything, print what would be selected and trained, do nothing", ""]
    return "\n".join([*lines, *key_lines(describe_keys(kind=EvaluateRunsConfig))])


def main(arguments: list[str]) -> None:
    if asks_for_help(arguments):
        print(help_text())
        return
    options, overrides = split_arguments(arguments)
    config = load(overrides)
    if options:
        print(describe(config))
        return
    # Late, so that --help and --dry-run need not import torch.
    from elfs_ray.evaluation.run import run

    print_results(run(config), RunDir(config.out))


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:])))
