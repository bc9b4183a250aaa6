"""select.*: scores and the coreset."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from elfs_ray.config.declaration import POSITIVE, Bounds, option

SELECT_METHODS = (
    "double_end",
    "hardest",
    "easiest",
    "stratified",
    "random",
    "dual_beta",
    "prototypicality",
    "d2",
    "zcore",
)
USES_HARD_FRACTION = ("double_end", "stratified")
FIND_HARD_FRACTION = ("auto", "search")

HardFraction = float | Literal["auto", "search"]
"""A hard fraction, or how it is found."""
if TYPE_CHECKING:
    HardFractions = HardFraction | list[HardFraction]
else:
    HardFractions = Any  # OmegaConf has no union with a list; `load_config` lets nothing else through


def _searches(select: "SelectConfig") -> bool:
    """Return whether any hard fraction is found by search, so that the keys of search mean anything."""
    fractions = select.hard_fraction if isinstance(select.hard_fraction, list) else [select.hard_fraction]
    return select.method in USES_HARD_FRACTION and "search" in fractions


@dataclass
class SelectConfig:
    """Scores and the coreset."""

    method: str = option(
        "double_end",
        "how scores become a coreset; prototypicality, d2 and zcore are label-free rivals that read nothing of the "
        "training, which a run makes all the same",
        choices=SELECT_METHODS,
    )
    score: str = option(
        "aum",
        "what orders the samples; dual_beta, prototypicality, d2 and zcore have their own",
        choices=("aum", "forgetting", "el2n", "correctness", "coarse_entropy", "dual", "prototypicality"),
    )
    hard_fraction: HardFractions = option(
        MISSING,
        "share of the whole pool dropped from the hard end (beta), for double_end and stratified; auto chooses it from "
        "what the run has, search by short trainings; [...] gives one for each budget; with balance it is one of each "
        "pseudo-class",
        unit="fraction",
        choices=FIND_HARD_FRACTION,
        bounds=Bounds(at_least=0, below=1),
    )
    search_step: float = option(
        0.1,
        "search: hard fractions tried are its multiples",
        unit="fraction",
        bounds=Bounds(above=0, at_most=0.5),
        decides=_searches,
    )
    search_iterations: int = option(
        2_000, "search: steps of every training", unit="steps", bounds=POSITIVE, decides=_searches
    )
    search_holdout: float = option(
        0.1,
        "search: share of the pool to test on, by its pseudo-labels; 10,000 images at most",
        unit="fraction",
        bounds=Bounds(above=0, at_most=0.5),
        decides=_searches,
    )
    balance: bool = option(False, "the same budget for each pseudo-class, as far as it has images; helps some pools")
    num_strata: int = option(
        50, "stratified: strata of equal score range", unit="strata", bounds=Bounds(at_least=1, at_most=63)
    )
    dual_exponent: float = option(
        4.0,
        "dual_beta: how fast it leans to easy images (CIFAR10 5.5, CIFAR100 4, ImageNet 11)",
        bounds=Bounds(above=0),
    )
    d2_neighbors: int = option(10, "d2: neighbours of each image in its graph", bounds=POSITIVE)
    zcore_draws: int = option(
        1_000_000, "zcore: random points that the pool has to cover", unit="draws", bounds=POSITIVE
    )
