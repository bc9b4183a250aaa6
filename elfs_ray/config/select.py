"""Keys of section select: how scores become a coreset."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from elfs_ray.config.declaration import POSITIVE, Bounds, option

SELECT_METHODS = (
    "auto",
    "double_end",
    "hardest",
    "easiest",
    "stratified",
    "random",
    "dual_beta",
    "prototypicality",
    "d2",
    "zcore",
    "coverage",
)
WITHOUT_DYNAMICS = ("auto", "random", "prototypicality", "d2", "zcore", "coverage")
"""The methods that read no training dynamics: a run that selects by one of them trains no proxy network."""
BY_COVERAGE = ("auto", "coverage")
"""The methods that choose by coverage: they balance by themselves, and labelled images cover others."""
USES_HARD_FRACTION = ("double_end", "stratified")
FIND_HARD_FRACTION = ("auto", "search")

HardFraction = float | Literal["auto", "search"]
"""A hard fraction, or the way to choose it."""
if TYPE_CHECKING:
    HardFractions = HardFraction | list[HardFraction]
else:
    # OmegaConf 2.3 knows no union with a list in it, and that of 2.4 refuses 0 for a float. So it is told Any, and
    # check_fields refuses all other values.
    HardFractions = Any


def uses_clusters(method: str, balance: bool) -> bool:
    """Return whether a selection reads pseudo-labels, or the distances of samples to the centres of their clusters."""
    return method not in WITHOUT_DYNAMICS or method in ("auto", "prototypicality") or (balance and method != "coverage")


def _searches(select: "SelectConfig") -> bool:
    """Return whether any hard fraction is chosen by search; only then do the keys search_* decide the result."""
    fractions = select.hard_fraction if isinstance(select.hard_fraction, list) else [select.hard_fraction]
    return select.method in USES_HARD_FRACTION and "search" in fractions


@dataclass
class SelectConfig:
    """Scores of the samples, and the selection of the coreset."""

    method: str = option(
        "auto",
        "how the coreset is chosen; coverage: in turn the image that makes all images most similar to a chosen one; "
        "auto: the same, after one image for each pseudo-class unless few pseudo-labels look right; double_end: as in "
        "the paper, by the training dynamics of a proxy network; random, prototypicality, d2 and zcore are "
        "baselines; auto, coverage and these four train no network",
        choices=SELECT_METHODS,
    )
    score: str = option(
        "aum",
        "score by which samples are ordered; dual_beta and the methods without training dynamics do not use it",
        choices=("aum", "forgetting", "el2n", "correctness", "coarse_entropy", "dual", "prototypicality"),
    )
    hard_fraction: HardFractions = option(
        MISSING,
        "for double_end and stratified: fraction of the whole pool to drop from the hard end (beta); auto estimates it "
        "from the training dynamics, search by short trainings; a list gives one for each budget; with balance, a "
        "fraction of each pseudo-class",
        unit="fraction",
        choices=FIND_HARD_FRACTION,
        bounds=Bounds(at_least=0, below=1),
    )
    search_step: float = option(
        0.1,
        "for search: try the multiples of this hard fraction",
        unit="fraction",
        bounds=Bounds(above=0, at_most=0.5),
        decides=_searches,
    )
    search_iterations: int = option(
        2_000, "for search: steps of each training", unit="steps", bounds=POSITIVE, decides=_searches
    )
    search_holdout: float = option(
        0.1,
        "for search: fraction of the pool on whose pseudo-labels to test; at most 10,000 images",
        unit="fraction",
        bounds=Bounds(above=0, at_most=0.5),
        decides=_searches,
    )
    labelled: str | None = option(
        None,
        "file that names the images which are labelled already, by sample_id or uri: a coreset.txt, Parquet, CSV or a "
        "JSON export of Label Studio; they are not chosen again, and the budget is that of further images; for auto "
        "and coverage they cover others",
        is_path=True,
        is_file=True,
    )
    exclude: str | None = option(
        None,
        "file, as for labelled, that names images which are never to be chosen; for auto and coverage they need not "
        "be covered either, as nothing that resembles them is wanted for their sake",
        # Where it is null, runs that were made before the key existed stay as they are.
        decides=lambda select: select.exclude is not None,
        is_path=True,
        is_file=True,
    )
    balance: bool = option(
        False, "select equally many images of each pseudo-class, as far as it has them; helps some pools"
    )
    num_strata: int = option(
        50,
        "for stratified: number of strata of equal score range",
        unit="strata",
        bounds=Bounds(at_least=1, at_most=63),
    )
    dual_exponent: float = option(
        4.0,
        "for dual_beta: how fast the selection moves to easy images as the budget shrinks (CIFAR10 5.5, CIFAR100 4, "
        "ImageNet 11)",
        bounds=Bounds(above=0),
    )
    d2_neighbors: int = option(10, "for d2: neighbours of each image in its graph", bounds=POSITIVE)
    zcore_draws: int = option(
        1_000_000, "for zcore: number of random points that the selection must cover", unit="draws", bounds=POSITIVE
    )

    @property
    def files_of_names(self) -> dict[str, str | None]:
        """Return the keys that name images which must not be chosen, with their files."""
        return {"select.labelled": self.labelled, "select.exclude": self.exclude}

    @property
    def uses_dynamics(self) -> bool:
        """Return whether the selection reads training dynamics."""
        return self.method not in WITHOUT_DYNAMICS

    @property
    def uses_clusters(self) -> bool:
        """Return whether the selection reads the clusters."""
        return uses_clusters(self.method, self.balance)
