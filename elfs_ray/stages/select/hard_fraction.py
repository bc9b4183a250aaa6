"""The hard fraction of each budget: the number given, or what `auto` and `search` find, with what speaks for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from elfs_ray.config import Config
from elfs_ray.methods.selection.pruning import budget_count
from elfs_ray.stages.select.auto import estimate_hard_fractions
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.search import search_hard_fractions
from elfs_ray.stages.select.windows import Budget
from elfs_ray.storage.run_dir import RunDir


class Choice(NamedTuple):
    """A budget with its hard fraction, and the figures it was found by; none where it was given."""

    budget: Budget
    evidence: Mapping[str, Any] | None


def choose_hard_fractions(config: Config, run_dir: RunDir, pool: ScoredPool) -> list[Choice]:
    """The number of samples and the hard fraction of each budget, in their order.

    Raises ValueError for budgets that do not fit the pool.
    """
    asked = config.hard_fractions
    counts = [budget_count(budget, pool.num_samples) for budget in config.budgets]
    found: dict[tuple[str, int], tuple[float, Mapping[str, Any]]] = {}
    for word, find in (("auto", estimate_hard_fractions), ("search", search_hard_fractions)):
        own = list(dict.fromkeys(count for count, other in zip(counts, asked, strict=True) if other == word))
        if own:
            found |= {
                (word, count): result for count, result in zip(own, find(config, run_dir, pool, own), strict=True)
            }
    choices = []
    for count, given in zip(counts, asked, strict=True):
        if isinstance(given, str):
            hard_fraction, evidence = found[given, count]
            choices.append(Choice(Budget(count, hard_fraction), {"found_by": given, **evidence}))
        else:
            choices.append(Choice(Budget(count, float(given)), None))
    return choices
