"""A stage as one value: what decides its result, what it reads and writes, what it needs, how a plan describes it.

A folder of stages/ that has a `STAGE` is a stage. Its `__init__` is light to import (no torch, Ray or faiss), so that
--help and --dry-run are quick and a worker imports only its own stage; `run.py` beside it does the work.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from elfs_ray.config import Config, deciding_keys
from elfs_ray.runtime.resources import Request
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:  # importing it imports Ray
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class Result:
    """What a complete stage tells later stages and the report; kept in its marker."""

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
    """One stage. Functions of the config say what depends on it; every default is that of a stage which needs nothing.

    result         the dataclass of its result, whose `stage` is its name
    section        the section of the config that decides its result, with the `global_keys` of the whole config
    section_keys   the keys of that section which decide it, where the others are another stage's
    describe       the work in a few words, for a pool of so many samples
    is_part_of     whether a run has this stage
    inputs         the stages whose tables it reads
    tables, files  the tables that it writes, and the files beside them
    requests       the workers and GPU tasks that it asks for, besides tasks of one CPU; its run takes its numbers from
                   the same functions. Raises ConfigError for a GPU where there can be none
    advice         what to tell a person before it runs for days
    check          raises ConfigError, before any work, for a config that this stage could not run
    check_result   raises ConfigError for a config that does not fit what the complete stage has counted
    epoch_gauges   the metrics of an epoch that it reports to Ray, with their meanings
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
    requests: "Callable[[Config, Devices], list[Request]]" = lambda config, devices: []
    advice: "Callable[[Config, Devices], list[str]]" = lambda config, devices: []
    check: Callable[[Config], None] = lambda config: None
    check_result: Callable[[Config, RunDir], None] = lambda config, run_dir: None
    epoch_gauges: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.result.stage

    def deciding_config(self, config: Config) -> dict[str, Any]:
        """Return the keys that decide the stage's result, with their values."""
        values = deciding_keys(getattr(config, self.section))
        keys = {f"{self.section}.{key}": values[key] for key in self.section_keys or values}
        return {**{key: getattr(config, key) for key in self.global_keys}, **keys}

    def outputs(self, config: Config) -> tuple[str, ...]:
        """Return every table and file that it writes."""
        return (*self.tables(config), *self.files(config))

    def run(self, config: Config, run_dir: RunDir) -> Result:
        """Do the work, by `run_<name>` in the folder's run.py, imported only now."""
        module = importlib.import_module(f"elfs_ray.stages.{self.name}.run")
        return getattr(module, f"run_{self.name}")(config, run_dir)
