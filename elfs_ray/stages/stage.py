"""Describe a stage as one value: its keys, its inputs and outputs, its workers, its checks.

A folder of stages/ whose `__init__` defines `STAGE` is a stage, and the run.py in it does the work. The `__init__` must
not import torch, Ray or faiss: --help and --dry-run stay quick, and a worker imports only its own stage.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from elfs_ray.config import Config, ConfigError, deciding_keys, digests_of_files, label_selector
from elfs_ray.runtime.placement import on_nodes
from elfs_ray.runtime.resources import Request
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:  # importing it imports Ray
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class Result:
    """The facts about a complete stage that later stages and the report use; kept in its marker."""

    stage: ClassVar[str]

    @classmethod
    def read(cls, run_dir: RunDir) -> Self:
        """Return the result of a complete stage. Raises FileNotFoundError, naming the stage, if it is not complete."""
        return cls.from_json(run_dir.complete_marker(cls.stage).result)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def _nothing(config: Config) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline. Attributes that depend on the config are functions of it.

    result         the dataclass of its result; the dataclass's `stage` is the name of the stage
    section        the section of the config that decides its result, together with the top-level keys `global_keys`
    section_keys   the keys of that section that matter to this stage; None for all of them
    describe       (config, number of samples) -> the work in a few words, for the plan
    is_part_of     True if a run with this config has the stage
    inputs         the stages whose tables it reads
    tables, files  the tables that it writes, and the files beside them
    is_on_driver   True if it needs no tasks or workers
    needs_ray      True if it needs Ray for a small pool, too
    grows          True if it appends to its tables for new images of the pool; other stages run again
    requests       the workers and GPU tasks that it requests, besides tasks of one CPU. Workers are started from these
                   same numbers, so that the plan cannot differ from the run. Raises ConfigError for a GPU where there
                   can be none
    advice         lines to print before the stage starts, such as a warning that it will take days
    check          raises ConfigError, before any work, for a config that the stage cannot run
    check_listed   raises ValueError, before any image is read, for a config that does not fit the samples in index/
    check_result   raises ConfigError for a config that does not fit the counts of the complete stage
    is_estimated   True if its time and memory are worth an estimate, by an estimate.py beside its run.py
    epoch_gauges   the metrics that it reports to Ray after each epoch, with their meanings
    """

    result: type[Result]
    section: str
    describe: Callable[[Config, int], str]
    is_part_of: Callable[[Config], bool] = lambda config: True
    inputs: Callable[[Config], tuple[str, ...]] = _nothing
    tables: Callable[[Config], tuple[str, ...]] = _nothing
    files: Callable[[Config], tuple[str, ...]] = _nothing
    global_keys: tuple[str, ...] = ("seed",)
    section_keys: tuple[str, ...] | None = None
    is_on_driver: bool = False
    needs_ray: Callable[[Config], bool] = lambda config: False
    is_estimated: bool = False
    grows: bool = False
    requests: "Callable[[Config, Devices], list[Request]]" = lambda config, devices: []
    advice: "Callable[[Config, Devices], list[str]]" = lambda config, devices: []
    check: Callable[[Config], None] = lambda config: None
    check_listed: Callable[[Config, RunDir], None] = lambda config, run_dir: None
    check_result: Callable[[Config, RunDir], None] = lambda config, run_dir: None
    epoch_gauges: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.result.stage

    @property
    def trains(self) -> bool:
        """Return whether it trains a network on the images, which may take hours."""
        return bool(self.epoch_gauges)

    def deciding_config(self, config: Config) -> dict[str, Any]:
        """Return the keys that decide the stage's result, with their values, and digests of the files that they name.

        Raises ConfigError for a file that cannot be read.
        """
        section = getattr(config, self.section)
        values = deciding_keys(section)
        keys = {f"{self.section}.{key}": values[key] for key in self.section_keys or values}
        # A file may have changed under its old path.
        keys |= digests_of_files(section, self.section)
        return {**{key: getattr(config, key) for key in self.global_keys}, **keys}

    def outputs(self, config: Config) -> tuple[str, ...]:
        """Return every table and file that it writes."""
        return (*self.tables(config), *self.files(config))

    def devices(self, config: Config, devices: "Devices") -> "Devices":
        """Return the part of a cluster's devices on which the stage may run.

        Raises ConfigError if no node has the labels that it needs, unless the cluster may grow.
        """
        selector, key = label_selector(config, self.section)
        if not selector or self.is_on_driver:
            return devices
        from elfs_ray.runtime.cluster import find_devices

        with on_nodes(selector):
            chosen = find_devices(config.ray_address)
        if not chosen.num_nodes and not chosen.may_grow:
            raise ConfigError(
                f"{key}: no node {devices.where} has the labels {','.join(f'{k}={v}' for k, v in selector.items())}. "
                "Correct it, or start nodes with these labels (ray start --labels)"
            )
        return chosen

    def estimate(self, work: Any) -> Any:
        """Return the Estimate of a `Work`: call `estimate` of the stage's estimate.py; None for a stage of seconds.

        Raises RuntimeError or ValueError where it cannot be estimated.
        """
        if not self.is_estimated:
            return None
        return importlib.import_module(f"elfs_ray.stages.{self.name}.estimate").estimate(work)

    def run(self, config: Config, run_dir: RunDir) -> Result:
        """Do the work: call `run_<name>` of the stage's run.py."""
        # Imported only now, since run.py imports torch and Ray (see the module's docstring).
        module = importlib.import_module(f"elfs_ray.stages.{self.name}.run")
        from elfs_ray.runtime.tasks import task_settings

        with on_nodes(label_selector(config, self.section)[0]), task_settings():
            return getattr(module, f"run_{self.name}")(config, run_dir)
