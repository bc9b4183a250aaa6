"""Compare the coresets of finished runs with baselines, by training on each with the true labels."""

from elfs_ray.cli import key_lines, print_results, read_arguments
from elfs_ray.config import describe_keys, fields_of
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.workload import describe, load
from elfs_ray.storage.run_dir import RunDir

HELP = """\
Compare the coresets of finished runs with baselines, by training on each with the true labels.

usage: elfs-ray evaluate RUN_DIR out=FOLDER test_uri=POOL [--dry-run] [key=value ...]

RUN_DIR     the run directory of a finished run; several: runs=[runs/a,runs/b]
out=        folder for selections, trainings and results
test_uri=   labelled images to test on, which no selection sees, in the format of the pool
--dry-run   check everything, print what would be selected and trained, do nothing
--help-all  list every key with its default

pool.label=label          where the true labels are, if the run did not copy them: a column, or folder
methods=[run,random]      what to compare: run (as it selected), random, auto, elfs, kmeans_centres, typiclust, ...
budgets=[50,0.1]          numbers or fractions of the embedded images
num_seeds=3               trainings of each method and budget
network=linear_probe      a linear probe of the embeddings; resnet18 and others: a network from scratch
image_size=32             side of the images that the network from scratch learns from
ray_address=HOST:PORT     run on a Ray cluster

For every method, budget and seed a linear probe, or a network from scratch, is tested on images that no selection has
seen. The same command resumes where it was stopped, and more methods, budgets or seeds repeat nothing. Example:

    elfs-ray evaluate elfs-ray/photos out=judged test_uri=test pool.label=folder methods=[run,random,typiclust]

To evaluate a single run at the end of its own selection, give `elfs-ray select` evaluate.test_uri=... instead.
"""


def main(arguments: list[str]) -> None:
    """Run, plan or explain an evaluation of finished runs."""
    typed = read_arguments(arguments, {key for key, _ in fields_of(EvaluateRunsConfig)}, positional="runs")
    if typed.help:
        print(HELP if typed.help == "short" else all_keys())
        return
    config = load([_as_list(text) for text in typed.overrides])
    if typed.dry_run:
        print(describe(config))
        return
    # Late, so that --help and --dry-run need not import torch.
    from elfs_ray.evaluation.run import run

    print_results((run(config), RunDir(config.out)))


def _as_list(override: str) -> str:
    """Return runs=a as runs=[a], and any other override unchanged."""
    key, _, value = override.partition("=")
    return f"runs=[{value}]" if key == "runs" and not value.startswith("[") else override


def all_keys() -> str:
    """Return the text of --help-all: every key with its default."""
    return "\n".join([HELP, *key_lines(describe_keys(kind=EvaluateRunsConfig))])
