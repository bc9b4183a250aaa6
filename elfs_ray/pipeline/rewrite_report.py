"""Write the report of a finished run again: with other keys of report, or by a newer version of elfs_ray."""

from collections.abc import Sequence
from typing import Any

from elfs_ray.config import DIGEST, Config, ConfigError, expand_home, load_config
from elfs_ray.pipeline.plan import PlannedStage, wanted_marker
from elfs_ray.pipeline.runner import locked, run_stage
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.stages.report import STAGE
from elfs_ray.storage.run_dir import RunDir

KEYS = ("run_dir", "report.images_per_grid")


def load(overrides: Sequence[str]) -> Config:
    """Return the config of a finished run with `key=value` overrides of KEYS. Raises ConfigError."""
    values = dict(override.partition("=")[::2] for override in overrides)
    if not values.get("run_dir"):
        raise ConfigError("no value for run_dir: give the run directory of a finished run")
    if others := sorted(values.keys() - set(KEYS)):
        raise ConfigError(f"{', '.join(others)} cannot be set here: a report takes {', '.join(KEYS)}")
    run_dir = RunDir(expand_home(values["run_dir"]))
    if run_dir.success_marker(STAGES[0].name) is None:
        raise ConfigError(f"{run_dir.uri} has no complete stage {STAGES[0].name}: give the folder of a finished run")
    return load_config(None, overrides, base=_keys_of(run_dir))


def _keys_of(run_dir: RunDir) -> dict[str, Any]:
    """Return the keys that the markers of a run record, nested as in YAML."""
    base: dict[str, Any] = {}
    for stage in STAGES:
        marker = run_dir.success_marker(stage.name)
        for key, value in (marker.config if marker else {}).items():
            if key.endswith(DIGEST):
                continue
            *sections, name = key.split(".")
            owner = base
            for section in sections:
                owner = owner.setdefault(section, {})
            owner[name] = value
    return base


def rewrite(config: Config) -> None:
    """Replace report.html and metrics.json. Raises ConfigError for a run that is not complete or is damaged."""
    run_dir = RunDir(config.run_dir)
    with locked(run_dir):
        write(config, run_dir)


def write(config: Config, run_dir: RunDir) -> None:
    """Do what `rewrite` does in a run directory that this driver has locked."""
    markers = {}
    for stage in STAGE.inputs(config):
        marker = run_dir.success_marker(stage)
        if marker is None or (damage := run_dir.damage(stage)):
            problem = "is damaged: " + "; ".join(damage) if marker else f"has no complete stage {stage}"
            raise ConfigError(f"{run_dir.uri} {problem}. Run `elfs-ray select` there first")
        markers[stage] = marker
    run_stage(PlannedStage(STAGE, "rerun", wanted_marker(STAGE, config, markers)), config, run_dir)
