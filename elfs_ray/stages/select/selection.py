"""Choose the samples that a selection keeps, without sorting the pool.

A method orders the samples, by hardness or at random for example, and keeps one window of ranks in each group. A group
is the whole pool or a pseudo-class. Tasks turn their rows into integer keys of the order, and the driver finds the cuts
around the windows from histograms of the keys (methods/selection/quantiles.py). One search finds the cuts of all groups
and budgets that share an order. The driver holds at most 64 MiB of histograms and a few numbers for each pseudo-class.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from elfs_ray.config import USES_HARD_FRACTION, SelectConfig
from elfs_ray.methods.selection import pruning
from elfs_ray.methods.selection.quantiles import (
    KEY_BITS,
    Cut,
    DigitRequest,
    assign_parts,
    count_digits,
    hardness_keys,
    part_ranks,
    rank_to_cut,
)
from elfs_ray.stages.select.scored_pool import Order, ScoredPool, ScoredRows

RANKS_PER_FILE = 1 << 20
LAST_KEY = np.uint32(2**KEY_BITS - 1)  # sorts after all samples that may be kept


@dataclass(frozen=True)
class ByHardness:
    """The order by hardness, the hardest first."""

    def keys(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        return pool.hardness_keys(rows)


@dataclass(frozen=True)
class ByRandom:
    """A random order."""

    seed: int

    def keys(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        return pruning.random_keys(rows.sample_ids, self.seed)


@dataclass(frozen=True)
class ByStratum:
    """The order by stratum of the score, random within a stratum; samples before their group's cut come last."""

    seed: int
    num_strata: int
    cuts: tuple[Cut, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    def strata(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        lowest, highest = np.array(self.lowest)[rows.groups], np.array(self.highest)[rows.groups]
        return pruning.strata_of(rows.scores, lowest, highest, pool.direction, self.num_strata)

    def keys(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        keys = pruning.stratified_keys(self.strata(pool, rows), rows.sample_ids, self.seed)
        return np.where(_from_cuts(pool, rows, self.cuts), keys, LAST_KEY)


@dataclass(frozen=True)
class ByDualWeight:
    """A random order with DUAL's Beta weights; `anchors` and `rates` hold one number for each group."""

    seed: int
    exponent: float
    anchors: tuple[float, ...]
    rates: tuple[float, ...]

    def keys(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        dual, mean_prob = (rows.column(name) for name in ("dual", "dual_mean_prob"))
        anchors, rates = np.array(self.anchors)[rows.groups], np.array(self.rates)[rows.groups]
        return pruning.dual_beta_keys(dual, mean_prob, rows.sample_ids, anchors, rates, self.seed, self.exponent)


class Budget(NamedTuple):
    """The number of samples in a coreset, and the hard fraction that is dropped before them."""

    num_kept: int
    hard_fraction: float


@dataclass(frozen=True)
class Selection:
    """The samples of one coreset: those between the `cuts` (lower, upper, lower, upper, ...) of an order.

    num_hard: the number of samples dropped from the hard end. part_cuts: the cuts between the coreset's files, if the
    search for `cuts` has found them as well.
    """

    order: Order
    cuts: tuple[Cut, ...]
    count: int
    num_hard: int
    part_cuts: tuple[Cut, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """Return whether the kept samples are a random sample, not a window by hardness."""
        return not isinstance(self.order, ByHardness)

    def mask(self, pool: ScoredPool, rows: ScoredRows) -> np.ndarray:
        """Return a mask of the rows that are kept, (n,) bool."""
        return assign_parts(pool.keys(self.order, rows), rows.sample_ids, self.cuts) % 2 == 0


def choose(pool: ScoredPool, config: SelectConfig, seed: int, budgets: Sequence[Budget]) -> list[Selection]:
    """Return the selection of each budget. Raises ValueError for budgets and hard fractions that do not fit."""
    if config.method == "stratified":
        return _choose_stratified(pool, config, seed, budgets)
    if config.method == "dual_beta":
        return _choose_dual(pool, config, seed, budgets)
    order: Order = ByRandom(seed) if config.method == "random" else ByHardness()
    windows = [find_windows(pool, budget, config.method) for budget in budgets]
    ranks = [_ranks(pool.counts, *window) for window in windows]
    # A coreset is written hardest first. If it is one window of that same order, one search finds the cuts between its
    # files as well; otherwise `find_part_cuts` needs a search of its own.
    if isinstance(order, ByHardness) and pool.num_groups == 1:
        ranks = [part_ranks(first, last - first, num_parts(last - first)) for first, last in ranks]
    all_cuts = find_cuts(pool, [(order, each) for each in ranks])
    selections = []
    for budget, (starts, _), cuts in zip(budgets, windows, all_cuts, strict=True):
        num_hard = 0 if config.method == "random" else int(starts.sum())
        ends = cuts if pool.num_groups > 1 else (cuts[0], cuts[-1])
        parts = cuts if isinstance(order, ByHardness) and pool.num_groups == 1 else ()
        selections.append(Selection(order, tuple(ends), budget.num_kept, num_hard, tuple(parts)))
    return selections


def group_windows(counts: np.ndarray, budget: Budget, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples before the window, samples in the window) of each group, each (groups,) int64."""
    hard_fraction = budget.hard_fraction if method in USES_HARD_FRACTION else 0.0
    starts, shares = pruning.balanced_windows(counts, budget.num_kept, hard_fraction)
    return (counts - shares if method == "easiest" else starts), shares


def find_windows(pool: ScoredPool, budget: Budget, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows of `group_windows` in the samples that may be chosen.

    The hard fraction is still one of the whole pool, so that the next round goes on where the last one stopped.
    """
    _, shares = windows = group_windows(pool.counts, budget._replace(hard_fraction=0.0), method)
    if not budget.hard_fraction or method not in USES_HARD_FRACTION:
        return windows
    if pool.left_out is None:
        return group_windows(pool.counts, budget, method)
    starts, _ = group_windows(pool.whole.counts, budget, method)
    first = np.cumsum(pool.whole.counts) - pool.whole.counts
    (cuts,) = find_cuts(pool.whole, [(ByHardness(), (first + starts).tolist())])
    num_before = sum(pool.map_shares(_count_before, cuts), np.zeros(pool.num_groups, np.int64))
    return np.minimum(num_before, pool.counts - shares), shares


def num_parts(count: int) -> int:
    """Return the number of files of a coreset with `count` samples."""
    return -(-count // RANKS_PER_FILE)


def find_cuts(pool: ScoredPool, wanted: Sequence[tuple[Order, Sequence[int]]]) -> list[list[Cut]]:
    """Return the cuts at the ranks of each (order, ranks); one search serves all that share an order."""
    cuts: dict[Order, dict[int, Cut]] = {}
    for order in dict.fromkeys(order for order, _ in wanted):
        ranks = sorted({rank for other, each in wanted if other == order for rank in each})
        cuts[order] = dict(zip(ranks, _search(pool, order, ranks), strict=True))
    return [[cuts[order][rank] for rank in ranks] for order, ranks in wanted]


def find_part_cuts(pool: ScoredPool, selection: Selection) -> tuple[Cut, ...]:
    """Return the cuts by hardness that divide the kept samples, of all groups, into the files of a coreset."""

    def gather(request: DigitRequest) -> Iterable[np.ndarray]:
        return pool.map_shares(_count_kept, selection, request)

    ranks = part_ranks(0, selection.count, num_parts(selection.count))
    return tuple(rank_to_cut(gather, ranks, pool.num_ids))


def _search(pool: ScoredPool, order: Order, ranks: Sequence[int]) -> list[Cut]:
    key_bits = KEY_BITS + (pool.num_groups - 1).bit_length()
    return rank_to_cut(lambda request: pool.map_shares(_count, order, request), ranks, pool.num_ids, key_bits)


def _ranks(counts: np.ndarray, starts: np.ndarray, shares: np.ndarray) -> list[int]:
    """Return the two ranks around each group's window, in the order of groups; none for a group that keeps nothing."""
    # Keys have the group in their highest bits, so a group's ranks begin after all samples of the groups before it.
    first = np.cumsum(counts) - counts + starts
    return np.stack([first, first + shares], axis=1)[shares > 0].ravel().tolist()


def _choose_stratified(pool: ScoredPool, config: SelectConfig, seed: int, budgets: Sequence[Budget]) -> list[Selection]:
    """Select by CCS: drop the hard fraction of each group, then divide its budget evenly over strata of the score.

    CCS is by Zheng et al., "Coverage-centric coreset selection for high pruning rates" (2210.15809).
    """
    windows = [find_windows(pool, budget, config.method) for budget in budgets]
    first = np.cumsum(pool.counts) - pool.counts
    lower = find_cuts(pool, [(ByHardness(), (first + starts).tolist()) for starts, _ in windows])
    orders = []
    for cuts in lower:
        # Strata divide the range of the scores that are left, so the hard fraction must be cut off first.
        ranges = list(pool.map_shares(_score_range, cuts))
        lowest = np.min([low for low, _ in ranges], axis=0)
        highest = np.max([high for _, high in ranges], axis=0)
        orders.append(ByStratum(seed, config.num_strata, tuple(cuts), tuple(lowest.tolist()), tuple(highest.tolist())))
    ranks = []
    for order, (_, shares) in zip(orders, windows, strict=True):
        shape = np.zeros((pool.num_groups, config.num_strata), np.int64)
        sizes = sum(pool.map_shares(_count_strata, order), shape)
        kept = np.stack([pruning.allocate_evenly(*group) for group in zip(sizes, shares.tolist(), strict=True)])
        before = first[:, None] + np.cumsum(sizes, axis=1) - sizes
        ranks.append(np.stack([before, before + kept], axis=2)[kept > 0].ravel().tolist())
    all_cuts = find_cuts(pool, list(zip(orders, ranks, strict=True)))
    return [
        Selection(order, tuple(cuts), budget.num_kept, int(starts.sum()))
        for order, cuts, budget, (starts, _) in zip(orders, all_cuts, budgets, windows, strict=True)
    ]


def _choose_dual(pool: ScoredPool, config: SelectConfig, seed: int, budgets: Sequence[Budget]) -> list[Selection]:
    """Select by DUAL's Beta sampling, with an anchor and a pruning rate for each group."""
    best = [np.concatenate(columns) for columns in zip(*pool.map_shares(_best_dual), strict=True)]
    groups, keys, sample_ids, mean_probs = best
    order = np.lexsort((sample_ids, keys, groups))
    # The tasks return their best samples; the best of these are the best of the pool.
    anchors = np.ones(pool.num_groups)
    for group in np.unique(groups):
        best_of_group = order[groups[order] == group][: pruning.DUAL_NUM_ANCHORS]
        anchors[group] = mean_probs[best_of_group].mean(dtype=np.float64)
    wanted: list[tuple[Order, list[int]]] = []
    for budget in budgets:
        starts, shares = group_windows(pool.counts, budget, config.method)
        rates = tuple((1 - shares / np.maximum(pool.counts, 1)).tolist())
        dual = ByDualWeight(seed, config.dual_exponent, tuple(anchors.tolist()), rates)
        wanted.append((dual, _ranks(pool.counts, starts, shares)))
    all_cuts = find_cuts(pool, wanted)
    return [
        Selection(order, tuple(cuts), budget.num_kept, 0)
        for (order, _), cuts, budget in zip(wanted, all_cuts, budgets, strict=True)
    ]


def _from_cuts(pool: ScoredPool, rows: ScoredRows, cuts: Sequence[Cut]) -> np.ndarray:
    """Return a mask of the rows at or after their group's cut by hardness, (n,) bool."""
    keys = pool.keys(ByHardness(), rows)
    cut_keys = np.array([cut.key for cut in cuts], keys.dtype)[rows.groups]
    cut_ids = np.array([cut.sample_id for cut in cuts], np.int64)[rows.groups]
    return (keys > cut_keys) | ((keys == cut_keys) & (rows.sample_ids >= cut_ids))


def _count(pool: ScoredPool, files: Sequence[str], order: Order, request: DigitRequest) -> np.ndarray:
    counts = np.zeros((len(request.prefixes), 1 << request.width), np.int64)
    for path in files:
        rows = pool.read(path)
        sample_ids = rows.sample_ids if request.reads_ids else None
        counts += count_digits(request, pool.keys(order, rows), sample_ids)
    return counts


def _count_before(pool: ScoredPool, files: Sequence[str], cuts: Sequence[Cut]) -> np.ndarray:
    """Return the number of samples in each group before its cut by hardness, (groups,) int64."""
    counts = np.zeros(pool.num_groups, np.int64)
    for path in files:
        rows = pool.read(path)
        counts += np.bincount(rows.groups[~_from_cuts(pool, rows, cuts)], minlength=counts.size)
    return counts


def _count_kept(pool: ScoredPool, files: Sequence[str], selection: Selection, request: DigitRequest) -> np.ndarray:
    counts = np.zeros((len(request.prefixes), 1 << request.width), np.int64)
    for path in files:
        rows = pool.read(path)
        kept = selection.mask(pool, rows)
        counts += count_digits(request, pool.hardness_keys(rows)[kept], rows.sample_ids[kept])
    return counts


def _score_range(pool: ScoredPool, files: Sequence[str], cuts: Sequence[Cut]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest score of each group after its cut, (groups,) float64; (inf, -inf) for none."""
    lowest, highest = np.full(pool.num_groups, np.inf), np.full(pool.num_groups, -np.inf)
    for path in files:
        rows = pool.read(path)
        left = _from_cuts(pool, rows, cuts)
        np.minimum.at(lowest, rows.groups[left], rows.scores[left].astype(np.float64))
        np.maximum.at(highest, rows.groups[left], rows.scores[left].astype(np.float64))
    return lowest, highest


def _count_strata(pool: ScoredPool, files: Sequence[str], order: ByStratum) -> np.ndarray:
    """Return the number of samples in each stratum of each group, (groups, strata) int64."""
    counts = np.zeros(pool.num_groups * order.num_strata, np.int64)
    for path in files:
        rows = pool.read(path)
        left = _from_cuts(pool, rows, order.cuts)
        cells = rows.groups * order.num_strata + order.strata(pool, rows)
        counts += np.bincount(cells[left], minlength=counts.size)
    return counts.reshape(pool.num_groups, order.num_strata)


def _best_dual(pool: ScoredPool, files: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the samples with the highest DUAL scores of each group: groups, keys, sample_ids, mean probabilities."""
    columns: list[tuple[np.ndarray, ...]] = []
    for path in files:
        rows = pool.read(path)
        keys = hardness_keys(rows.column("dual"), "high")
        order = np.lexsort((rows.sample_ids, keys, rows.groups))
        counts = np.bincount(rows.groups, minlength=pool.num_groups)
        # The rank of each sample within its group, counted from 0.
        place = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        best = order[place < pruning.DUAL_NUM_ANCHORS]
        mean_probs = rows.column("dual_mean_prob")
        columns.append((rows.groups[best], keys[best], rows.sample_ids[best], mean_probs[best]))
    groups, all_keys, sample_ids, all_probs = (np.concatenate(column) for column in zip(*columns, strict=True))
    return groups, all_keys, sample_ids, all_probs
