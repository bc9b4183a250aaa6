"""Choose which images of a pool to label: run the pipeline, and the evaluation if the config has one."""

import os
import re
from pathlib import Path

from elfs_ray.cli import Arguments, key_lines, read_arguments, run_config
from elfs_ray.config import Config, ConfigError, describe_keys, fields_of, load_config
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.presets import DEFAULT, NAMES, preset
from elfs_ray.runtime.progress import say

KEYS = {key for key, _ in fields_of(Config)} | {"preset"}
RESULTS = "elfs-ray"  # the folder of all run directories that nobody has named
HELP = f"""\
Choose which images of a pool to label.

usage: elfs-ray select PHOTOS --budget 200 [--dry-run] [key=value ...]

PHOTOS      a folder of images, Parquet or WebDataset tars, local, s3:// or gs:// (or pool.uri=...)
--budget    how many images: a number (200), or a fraction of the pool (0.1)
--preset    settings to start from: {", ".join(NAMES)}
            {DEFAULT}, the default: the best encoder on this machine; no training, no download
--dry-run   check everything and print the plan, its hours and memory; start nothing
--help-all  list every key with its default; each can be written as key=value or --key value

run_dir=FOLDER             where results go; else {RESULTS}/<name of the pool> in the current folder
select.labelled=FILE       images that are labelled already: the budget is the next ones
select.method=double_end   ELFS as in the paper (with select.hard_fraction=auto); slow without a GPU
embed.encoder=NAME         another encoder, such as timm/vit_base_patch14_dinov2.lvd142m
embed.weights=FILE         its weights, if this machine cannot download them
cluster.num_clusters=N     the number of classes that you expect
pool.label=folder          true labels, for evaluation alone; with
evaluate.test_uri=POOL     labelled test images: compare the choice with random images
on_change=rerun            replace what was made with other settings
ray_address=HOST:PORT      run on a Ray cluster
seed=N                     the seed of all random choices
until=STAGE                stop after a stage:
                           {", ".join(stage.name for stage in STAGES)}

Type the same command again to resume a run that was stopped.
"""


def main(arguments: list[str]) -> None:
    """Run, plan or explain a selection."""
    typed = read_arguments(arguments, KEYS, positional="pool.uri")
    if typed.help:
        print(HELP if typed.help == "short" else all_keys(yaml_of(typed)))
        return
    config = load(typed)
    if typed.dry_run:
        # This import loads Ray, which takes seconds, and --help should not wait for it.
        from elfs_ray.evaluation.job import describe

        print(describe(config))
        return
    if not any(text.startswith("run_dir=") for text in typed.overrides):
        say(f"run_dir   {config.run_dir} (run_dir=... sets another)")
    run_config(config)


def yaml_of(typed: Arguments) -> Path:
    """Return the YAML file of the preset, and remove `preset` from the overrides. Raises ConfigError."""
    return preset(typed.take("preset") or DEFAULT)


def load(typed: Arguments) -> Config:
    """Return the config; a pool on this machine needs no run_dir. Raises ConfigError."""
    yaml = yaml_of(typed)
    # A shell completes a folder's name with a slash, and photos/ must resume the run of photos.
    overrides = [text.rstrip("/") if re.fullmatch(r"pool\.uri=.*[^:/]/+", text) else text for text in typed.overrides]
    pools = [value for key, _, value in (text.partition("=") for text in overrides) if key == "pool.uri"]
    run_dir = default_run_dir(pools[-1]) if pools else None
    try:
        return load_config(yaml, overrides, base={"run_dir": run_dir} if run_dir else None)
    except ConfigError as error:
        if pools or not str(error).startswith("no value for "):
            raise
        raise ConfigError(f"{error}, such as `elfs-ray select photos --budget 200`") from error


def default_run_dir(pool: str) -> str | None:
    """Return the run directory of a pool on this machine; None for a list, a pattern, or a pool elsewhere."""
    # The current folder of a submitted job is a copy that Ray deletes.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "://" in pool or set(pool) & set("[]*?"):
        return None
    path = Path(os.path.abspath(os.path.expanduser(pool)))
    return f"{RESULTS}/{path.stem if path.is_file() else path.name}"


def all_keys(yaml: Path) -> str:
    """Return the text of --help-all: every key, with the default that the preset gives it."""
    return "\n".join([HELP, f"The defaults below are those of {yaml.name}.", "", *key_lines(describe_keys(yaml))])
