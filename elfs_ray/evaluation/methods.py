"""Declare the methods that an evaluation compares: what each selects, and from which runs."""

from dataclasses import dataclass
from typing import Literal

from elfs_ray.config import EVALUATED_METHODS, PAPERS_METHOD


@dataclass(frozen=True)
class Method:
    """A way to select samples; each gets a line in the table of results.

    select_keys: keys of stage select that override the run's; None if stage select does not make the selection.
    made_from: only the first run, one run per distinct set of embeddings, or every run.
    is_per_seed: select anew for each seed. is_supervised: the scores come from a proxy trained on true labels.
    """

    meaning: str
    select_keys: tuple[str, ...] | None
    made_from: Literal["first run", "embeddings", "every run"] = "every run"
    is_per_seed: bool = False
    is_supervised: bool = False


LEAVES_NOTHING_OUT = ("select.labelled=null", "select.exclude=null", "duplicates.threshold=null")
"""Keys of a selection in which every image may be chosen."""
_ELFS = f"select.method={PAPERS_METHOD}"


def _unbalanced(method: str, *keys: str) -> tuple[str, ...]:
    """Return the keys of a baseline, which neither balances nor leaves any image out, even if the run does."""
    return (
        f"select.method={method}",
        *keys,
        "select.balance=false",
        *LEAVES_NOTHING_OUT,
    )


METHODS = {
    "run": Method("as the run selects, at each budget", ()),
    "auto": Method("coverage of each pseudo-class, then of the pool", ("select.method=auto", "select.balance=false")),
    "coverage": Method("coverage of the pool", ("select.method=coverage", "select.balance=false"), "embeddings"),
    "random": Method("sampled uniformly, anew for each seed", _unbalanced("random"), "first run", is_per_seed=True),
    "prototypicality": Method(
        "the samples farthest from their k-means centroid", _unbalanced("prototypicality"), "embeddings"
    ),
    "d2": Method("D2 pruning over the graph of nearest neighbours, without labels", _unbalanced("d2"), "embeddings"),
    "zcore": Method(
        "ZCore: covers the space of embeddings; one selection for all seeds", _unbalanced("zcore"), "embeddings"
    ),
    "kmeans_centres": Method("the samples nearest to as many k-means centres", None, "embeddings"),
    "typiclust": Method("TypiClust: the most typical sample of each k-means cluster", None, "embeddings"),
    "aum_hardest": Method("lowest AUM on pseudo-labels", _unbalanced("hardest", "select.score=aum")),
    "elfs": Method("ELFS as in the paper, with the run's other keys of select", (_ELFS,)),
    "elfs_auto": Method(
        "the same, with the hard fraction estimated from the training dynamics",
        (_ELFS, "select.hard_fraction=auto"),
    ),
    "elfs_search": Method(
        "the same, with the hard fraction found by short trainings on pseudo-labels",
        (_ELFS, "select.hard_fraction=search"),
    ),
    "dual": Method(
        "DUAL with Beta sampling, on pseudo-labels, anew for each seed", _unbalanced("dual_beta"), is_per_seed=True
    ),
    "badge": Method(
        "BADGE: buys labels in rounds, guided by a network trained on those bought so far; one selection for all seeds",
        None,
        "first run",
    ),
    "aum_ccs": Method(
        "with true labels: CCS over AUM, anew for each seed",
        _unbalanced("stratified", "select.score=aum"),
        "first run",
        is_per_seed=True,
        is_supervised=True,
    ),
    "el2n": Method(
        "with true labels: highest EL2N", _unbalanced("hardest", "select.score=el2n"), "first run", is_supervised=True
    ),
    "forgetting": Method(
        "with true labels: most often forgotten",
        _unbalanced("hardest", "select.score=forgetting"),
        "first run",
        is_supervised=True,
    ),
    "full": Method("all images, whatever the budgets", None, "first run"),
}
# config/ has a list of its own for the help texts, as it may not import from here.
assert tuple(METHODS) == EVALUATED_METHODS
