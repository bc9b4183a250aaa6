"""How a key is declared: its default, what it means, its unit, the values it may have, whether it decides a result."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key, what it was given and what it needs."""


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key may have; None where there is no limit."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        signs = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)

    def allow(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(
    default: Any,
    help_text: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    bounds: Bounds | None = None,
    decides: bool | Callable[[Any], bool] = True,
    is_path: bool = False,
) -> Any:
    """Declare a config key. `decides` says whether its value changes the stage's tables, or asks its section."""
    limits = {"choices": tuple(choices), "bounds": bounds}
    metadata = {"help": help_text, "unit": unit, **limits, "decides": decides, "is_path": is_path}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


POSITIVE = Bounds(at_least=1)
SIDE = Bounds(at_least=1, at_most=8192)
PROXY_SIDE = Bounds(at_least=8, at_most=4096)
BATCH = Bounds(at_least=2, at_most=1 << 20)
WIDTH = Bounds(at_least=1, at_most=1 << 16)


def precision_option() -> Any:
    """Declare the precision of matrix products in a training."""
    return option("auto", "auto is bf16 on GPUs and fp32 on CPUs", choices=("auto", "fp32", "bf16", "fp16"))


def compile_option() -> Any:
    """Declare whether torch.compile makes the kernels of a training."""
    return option(False, "compile the network with torch.compile; up to a minute at the start of every worker")


def memory_option(worker: str) -> Any:
    """Declare the memory that Ray sets aside for each worker of a stage."""
    meaning = f"memory set aside for each {worker}; null sets none aside"
    return option(None, meaning, unit="GiB", bounds=Bounds(above=0), decides=False)


def device_option(what_runs: str) -> Any:
    """Declare the device of a stage; `what_runs` is a phrase such as "training runs"."""
    meaning = f"where {what_runs}; auto takes GPUs if the cluster has any"
    return option("auto", meaning, choices=("auto", "cpu", "cuda"), decides=False)


def max_failures_option(what: str) -> Any:
    """Declare how many workers of a group may fail."""
    meaning = f"failed workers after which {what} gives up; -1 never does, and nodes taken back are not counted"
    return option(5, meaning, bounds=Bounds(at_least=-1), decides=False)


def fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key below a section, dotted, in the order of declaration."""
    for spec in dataclasses.fields(section):
        if spec.metadata:
            yield prefix + spec.name, spec
        else:
            assert isinstance(spec.type, type)
            yield from fields_of(spec.type, f"{prefix}{spec.name}.")
