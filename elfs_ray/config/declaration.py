"""Declare config keys: default, help text, unit, allowed values, and whether the key decides a stage's result."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be run. The message names the key, its value, what is allowed and what to do."""


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; None means no limit."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        """Return the limits as text, such as ">= 0 and < 1"."""
        signs = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)

    def allow(self, value: float) -> bool:
        """Return whether a value is within the limits; NaN and infinity never are."""
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
    is_file: bool = False,
) -> Any:
    """Declare a config key, as a field of a dataclass.

    decides: whether the value changes the stage's tables, so that complete stages are refused when it differs; or a
        function of the section that returns this.
    is_path: whether a leading ~ stands for the home directory.
    is_file: whether the content of the file that it names decides the stage's result, too.
    """
    limits = {"choices": tuple(choices), "bounds": bounds}
    metadata = {"help": help_text, "unit": unit, **limits, "decides": decides}
    metadata |= {"is_path": is_path, "is_file": is_file}
    if isinstance(default, list):
        # Dataclasses refuse mutable defaults, and every config must get a list that nobody else changes.
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


POSITIVE = Bounds(at_least=1)
SIDE = Bounds(at_least=1, at_most=8192)
PROXY_SIDE = Bounds(at_least=8, at_most=4096)
BATCH = Bounds(at_least=2, at_most=1 << 20)
WIDTH = Bounds(at_least=1, at_most=1 << 16)


def precision_option() -> Any:
    """Declare the precision of the matrix products in training."""
    meaning = "precision of matrix products; auto means bf16 on GPUs and fp32 on CPUs"
    return option("auto", meaning, choices=("auto", "fp32", "bf16", "fp16"))


def compile_option() -> Any:
    """Declare whether a network is trained with torch.compile."""
    # It decides the result: compiled kernels round differently.
    return option(False, "compile the network with torch.compile, which takes each worker up to a minute at its start")


def memory_option(worker: str) -> Any:
    """Declare the memory that Ray sets aside for each worker of a stage."""
    meaning = f"memory that Ray reserves for each {worker}; null reserves none"
    return option(None, meaning, unit="GiB", bounds=Bounds(above=0), decides=False)


def label_option(whose: str, unset: str) -> Any:
    """Declare the labels that the nodes of a stage must have; `whose` names the stage, `unset` what null means."""
    meaning = (
        f"labels that a node must have to run {whose}, such as ray.io/market-type=spot; with commas between several, "
        f"and !value, in(value,value) or !in(value,value) for a value; null means {unset}"
    )
    return option(None, meaning, decides=False)


def device_option(what_runs: str) -> Any:
    """Declare the device of a stage; `what_runs` is a phrase such as "training runs"."""
    meaning = f"device on which {what_runs}; auto uses GPUs if the cluster has any"
    return option("auto", meaning, choices=("auto", "cpu", "cuda"), decides=False)


def max_failures_option(what: str) -> Any:
    """Declare how many workers of a group may fail."""
    meaning = (
        f"number of worker failures after which {what} gives up; -1 retries without limit; preempted nodes do not count"
    )
    return option(5, meaning, bounds=Bounds(at_least=-1), decides=False)


def fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield the dotted name and the field of every key below a section, in the order of declaration."""
    for spec in dataclasses.fields(section):
        if spec.metadata:  # written by `option`; a nested section has none
            yield prefix + spec.name, spec
        else:
            assert isinstance(spec.type, type)
            yield from fields_of(spec.type, f"{prefix}{spec.name}.")
