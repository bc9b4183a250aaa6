"""The methods that an evaluation compares: what each selects, and from which runs."""

from dataclasses import dataclass
from typing import Literal

from elfs_ray.config import EVALUATED_METHODS


@dataclass(frozen=True)
class Method:
    """A way to select, of which a line of the table tells how good it is.

    select_keys: the keys that stage select gets over those of the run; None where another code selects.
    made_from: the first run alone, one run of each kind of embeddings, or every run.
    is_per_seed: each seed has a selection of its own. is_supervised: scores come from a proxy trained on true labels.
    """

    meaning: str
    select_keys: tuple[str, ...] | None
    made_from: Literal["first run", "embeddings", "every run"] = "every run"
    is_per_seed: bool = False
    is_supervised: bool = False


def _plain(method: str, *keys: str) -> tuple[str, ...]:
    """Return the keys of a baseline, which selects from the pool as a whole even where the run balances."""
    return (f"select.method={method}", *keys, "select.balance=false")


METHODS = {
    "random": Method("sampled uniformly, anew for each seed", _plain("random"), "first run", is_per_seed=True),
    "prototypicality": Method("farthest from their k-means centroid", _plain("prototypicality"), "embeddings"),
    "d2": Method("D2 pruning over the run's neighbours, without labels", _plain("d2"), "embeddings"),
    "zcore": Method("ZCore: covers the embeddings; once for all seeds", _plain("zcore"), "embeddings"),
    "aum_hardest": Method("lowest AUM of the pseudo-labels", _plain("hardest", "select.score=aum")),
    "elfs": Method("what the run selects by, at each budget", ()),
    "elfs_auto": Method(
        "the same, the hard fraction estimated from the run's training dynamics", ("select.hard_fraction=auto",)
    ),
    "elfs_search": Method(
        "the same, the hard fraction searched by short trainings on pseudo-labels", ("select.hard_fraction=search",)
    ),
    "dual": Method(
        "DUAL with Beta sampling, on pseudo-labels, anew for each seed", _plain("dual_beta"), is_per_seed=True
    ),
    "badge": Method(
        "BADGE: labels bought round by round, the network trained on those bought so far; once for all seeds",
        None,
        "first run",
    ),
    "aum_ccs": Method(
        "true labels: CCS over AUM, anew for each seed",
        _plain("stratified", "select.score=aum"),
        "first run",
        is_per_seed=True,
        is_supervised=True,
    ),
    "el2n": Method(
        "true labels: highest EL2N", _plain("hardest", "select.score=el2n"), "first run", is_supervised=True
    ),
    "forgetting": Method(
        "true labels: most forgotten", _plain("hardest", "select.score=forgetting"), "first run", is_supervised=True
    ),
    "full": Method("all images, once whatever the budgets", None, "first run"),
}
assert tuple(METHODS) == EVALUATED_METHODS
