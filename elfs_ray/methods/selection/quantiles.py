"""Select exactly by rank over any number of shards, without sorting the pool.

Samples are ordered hard-first: by an order-preserving integer key of their score, ties by sample_id. (key, sample_id)
is read as one number, and the number at a given rank is found as in a radix sort that follows only the digits it needs:
one histogram over the first digit, then one over the next digit of the boundary bin alone, until the rank falls on the
edge of a bin. Whoever drives the search sees histograms, never samples.

A shard is anything that can answer `count_digits(request, keys, sample_ids)` for the samples it holds:

    keys = hardness_keys(scores, direction)                          # on each worker
    gather = lambda request: (count_digits(request, keys, ids) for keys, ids in shards)
    lower, upper = rank_to_cut(gather, [start, start + count], num_ids)
    kept = assign_parts(keys, ids, [lower, upper]) == 0              # on each worker

Groups (pseudo-classes, strata) need no search of their own: `grouped_keys` puts the group above the key, so that every
group is a stretch of ranks, and one search finds the cuts of all. The more bins a search follows, the shorter its
digits: a thousand groups take three more requests of 32 MiB, not a thousand histograms.

A position inside the window (0 = the hardest kept) needs no global sort either. Cut the window at the ranks
`part_ranks(start, count, num_parts)`; `assign_parts` says which part a sample belongs to; whoever collects part i sorts
it by `hard_first_order` and adds `ranks[i] - start`. Parts differ in size by one sample at most, ties or not.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Direction = Literal["low", "high"]
"""The end of a score's range at which the hard samples lie."""

KEY_BITS = 32
ID_BITS = 48
MAX_GROUPS = 1 << 16
MAX_SAMPLE_IDS = 1 << ID_BITS

_DIGIT_BITS = 16  # of a search for a few ranks
_FEW_RANKS = 64
_REQUEST_BITS = 22  # bins of a request for many ranks: 32 MiB
_COARSE_BITS = 16
_FEW_CUTS = 16
_CHUNK = 1 << 18  # samples counted at a time: keeps temporaries in the cache and out of the memory formula
_SIGN_BIT = np.uint32(1 << 31)


class Cut(NamedTuple):
    """A place between two samples of the hard-first order: before it lies every (key, sample_id) smaller than it."""

    key: int
    sample_id: int


class DigitRequest(NamedTuple):
    """A request for histograms of a digit: `width` bits of key · 2**48 + sample_id, with `shift` bits below it.

    Counted are the samples whose bits above the digit are one of `prefixes`, increasing; the first digit has only 0.
    """

    shift: int
    width: int
    prefixes: tuple[int, ...]

    @property
    def reads_ids(self) -> bool:
        """Return whether the digit is one of the sample_id, not of the key."""
        return self.shift < ID_BITS


def hardness_keys(scores: np.ndarray, direction: Direction) -> np.ndarray:
    """Map scores to uint32 keys whose ascending order is hard-first; equal scores (0.0 and -0.0 too) get equal keys.

    scores: (n,) float32 or int32, as they are stored. direction: the end where hard samples lie.
    Raises ValueError for another dtype or for scores that are not finite.
    """
    if direction not in ("low", "high"):
        raise ValueError(f"direction is {direction!r}; it must be 'low' or 'high', the end where hard samples lie")
    if scores.dtype == np.float32:
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise ValueError(
                f"{bad.size} of {scores.size} scores are NaN or infinite, the first at position {bad[0]} "
                f"({scores[bad[0]]}); remove these samples or score them again before selecting"
            )
        bits = (scores + np.float32(0)).view(np.int32)  # adding 0 turns -0.0 into 0.0
        # Of negative numbers every bit is turned over, of others the sign alone.
        keys = (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
    elif scores.dtype == np.int32:
        keys = scores.view(np.uint32) ^ _SIGN_BIT
    else:
        raise ValueError(
            f"scores have dtype {scores.dtype}; give float32 or int32, the types in which scores are stored, "
            "so that the order is the same wherever they are read"
        )
    return ~keys if direction == "high" else keys


def grouped_keys(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Put a group above each key: (n,) uint64 of 32 + 16 bits whose order is by group, then by key.

    groups: (n,) integers, 0 <= group < 65,536; keys: (n,) uint32. Raises ValueError for groups outside that range.
    """
    if groups.size and not 0 <= groups.min() <= groups.max() < MAX_GROUPS:
        raise ValueError(f"groups range from {groups.min()} to {groups.max()}; they must lie in [0, {MAX_GROUPS})")
    return (groups.astype(np.uint64) << np.uint64(KEY_BITS)) | keys


def hard_first_order(keys: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Return the positions (n,) int64 that sort by (key, sample_id)."""
    return np.lexsort((sample_ids, keys))


def count_digits(request: DigitRequest, keys: np.ndarray, sample_ids: np.ndarray | None) -> np.ndarray:
    """Count one digit of the samples under each prefix: a shard's answer to a request.

    keys: (n,) uint32 or uint64 below 2**48; sample_ids: (n,) int64, 0 <= id < 2**48, or None where the request does not
    read them. Returns (number of prefixes, 2**width) int64. Answers for disjoint blocks of a shard add up, so a shard
    larger than memory can be counted block by block. Memory: 8 bytes a bin, that is 0.5 MiB a prefix for digits of 16
    bits, and a few MiB besides the arrays.
    """
    counts = np.zeros(len(request.prefixes) << request.width, np.int64)
    for begin in range(0, keys.size, _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        if request.reads_ids:
            assert sample_ids is not None, request
            _id_digits(counts, request, keys[chunk], sample_ids[chunk])
        else:
            _key_digits(counts, request, keys[chunk])
    return counts.reshape(len(request.prefixes), 1 << request.width)


def rank_to_cut(
    gather: Callable[[DigitRequest], Iterable[np.ndarray]],
    ranks: Sequence[int],
    num_ids: int,
    key_bits: int = KEY_BITS,
) -> list[Cut]:
    """Find, for each rank, the cut that has exactly that many samples before it in hard-first order.

    gather: sends a request to every shard and yields their `count_digits` answers in any order; called two to five
    times for up to 64 ranks, up to a dozen times for thousands. ranks: 0 <= rank <= samples in all shards. num_ids: an
    upper bound of the sample ids, exclusive (their number, when dense); it saves the passes over digits that are zero.
    key_bits: 32, or as many as `grouped_keys` of so many groups have.
    Raises ValueError for ranks beyond the samples, ids beyond 2**48 and sample ids held twice at a boundary.
    Memory: 1 MiB a distinct boundary bin (at most one a rank) for up to 64 ranks, else 64 MiB in all for up to a
    million of them, whatever the number of samples and shards.
    """
    if not 0 < num_ids <= MAX_SAMPLE_IDS:
        raise ValueError(f"num_ids is {num_ids}; it must be one more than the largest sample id, at most 2**48")
    used_id_bits = max(1, (num_ids - 1).bit_length())
    cuts: dict[int, Cut] = {}
    searches = {rank: _Search(prefix=0, skip=rank, num_samples=-1) for rank in ranks}
    left = key_bits + ID_BITS
    while searches and left:
        if left == ID_BITS:
            left, zero_bits = used_id_bits, ID_BITS - used_id_bits
            searches = {rank: search._replace(prefix=search.prefix << zero_bits) for rank, search in searches.items()}
        prefixes = tuple(sorted({search.prefix for search in searches.values()}))
        width = min(_digit_width(len(ranks), len(prefixes)), left - ID_BITS if left > ID_BITS else left)
        left -= width
        request = DigitRequest(left, width, prefixes)
        before = np.cumsum(_sum_histograms(gather(request), request), axis=1)
        is_first = left + width == key_bits + ID_BITS
        _check_counts(is_first, searches, dict(zip(prefixes, before[:, -1].tolist(), strict=True)))
        rows = dict(zip(prefixes, before, strict=True))
        searches = {rank: _narrow(search, rows[search.prefix]) for rank, search in searches.items()}
        cuts |= {
            rank: _edge_to_cut(search.prefix << left, key_bits) for rank, search in searches.items() if not search.skip
        }
        searches = {rank: search for rank, search in searches.items() if search.skip}
    if searches:
        held_twice = sorted({search.prefix % MAX_SAMPLE_IDS for search in searches.values()})
        raise ValueError(
            f"sample ids {held_twice[:5]} are held more than once among the shards; every sample may have one score: "
            "look for a scores file that was read twice"
        )
    return [cuts[rank] for rank in ranks]


def part_ranks(start: int, count: int, num_parts: int) -> list[int]:
    """Return the num_parts + 1 ranks that cut the window [start, start + count) into parts of equal size, to one."""
    return [start + count * part // num_parts for part in range(num_parts + 1)]


def assign_parts(keys: np.ndarray, sample_ids: np.ndarray, cuts: Sequence[Cut]) -> np.ndarray:
    """Return, for each sample, the i with cuts[i] <= sample < cuts[i + 1], or -1 outside all of them: (n,) int32.

    keys: (n,) uint32 or uint64; sample_ids: (n,) int64; cuts: at least two, in hard-first order.
    """
    cut_keys = np.array([cut.key for cut in cuts], keys.dtype)
    cut_ids = np.array([cut.sample_id for cut in cuts], np.int64)
    if len(cuts) <= _FEW_CUTS:  # several times faster than a search
        parts = np.full(keys.size, -1, np.int32)
        for cut_key in cut_keys:
            parts += keys >= cut_key
    else:
        parts = np.searchsorted(cut_keys, keys, side="right").astype(np.int32) - 1
    # A sample with the key of a cut lies before that cut when its id does.
    tied = np.flatnonzero(cut_keys[np.maximum(parts, 0)] == keys)
    while tied.size:
        tied = tied[sample_ids[tied] < cut_ids[parts[tied]]]
        parts[tied] -= 1
        tied = tied[(parts[tied] >= 0) & (cut_keys[parts[tied]] == keys[tied])]
    parts[parts == len(cuts) - 1] = -1
    return parts


def _digit_width(num_ranks: int, num_prefixes: int) -> int:
    """Return the bits of the next digit: 16 for a few ranks, else as many as keep a request within its bins."""
    if num_ranks <= _FEW_RANKS:
        return _DIGIT_BITS
    return max(1, _REQUEST_BITS - (num_prefixes - 1).bit_length())


def _key_digits(counts: np.ndarray, request: DigitRequest, keys: np.ndarray) -> None:
    """Add a digit of the keys whose bits above it are one of the prefixes."""
    kind = keys.dtype.type
    shift = request.shift - ID_BITS
    if request.prefixes == (0,) and keys.size and not (keys >> kind(shift)).max() >> request.width:
        counts += np.bincount(keys >> kind(shift), minlength=counts.size)
        return
    above = keys >> kind(shift + request.width)
    matches, rows = _rows_among(np.array(request.prefixes, np.uint64), above)
    digits = (keys[matches] >> kind(shift)) & kind((1 << request.width) - 1)
    np.add.at(counts, (rows << request.width) + digits.astype(np.int64), 1)


def _id_digits(counts: np.ndarray, request: DigitRequest, keys: np.ndarray, sample_ids: np.ndarray) -> None:
    """Add a digit of the ids of samples whose key, and id above that digit, make one of the prefixes."""
    above_bits = ID_BITS - request.shift - request.width
    split = [divmod(prefix, 1 << above_bits) for prefix in request.prefixes]
    boundary_keys, key_rows = np.unique(np.array([key for key, _ in split], np.uint64), return_inverse=True)
    id_prefixes = np.array([id_prefix for _, id_prefix in split], np.uint64)
    near, rows_of_keys = _rows_among(boundary_keys, keys)
    ids = sample_ids[near].astype(np.uint64)
    # The row of the key stands for the key: 16 + 48 bits fit.
    prefixes = (key_rows.astype(np.uint64) << np.uint64(above_bits)) | id_prefixes
    above = (rows_of_keys.astype(np.uint64) << np.uint64(above_bits)) | (ids >> np.uint64(ID_BITS - above_bits))
    matches, rows = _rows_among(prefixes, above)
    digits = (ids[matches] >> np.uint64(request.shift)) & np.uint64((1 << request.width) - 1)
    np.add.at(counts, (rows << request.width) + digits.astype(np.int64), 1)


def _rows_among(wanted: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find which numbers (n,) are among `wanted` (p,) uint64, increasing: their positions, and rows in `wanted`, int64.

    A table of their leading bits sorts most numbers out before the rest are searched for.
    """
    excess = max(0, int(wanted[-1]).bit_length() - _COARSE_BITS)
    leading = (wanted >> np.uint64(excess)).astype(np.int64)
    table = np.full(int(leading[-1]) + 2, -1, np.int64)
    table[leading] = np.arange(wanted.size)
    kind = numbers.dtype.type
    rows = table[np.minimum(numbers >> kind(excess), kind(table.size - 1)).astype(np.int64)]
    near = np.flatnonzero(rows >= 0)
    if not excess:
        return near, rows[near]
    rows = np.minimum(np.searchsorted(wanted, numbers[near].astype(np.uint64)), wanted.size - 1)
    match = wanted[rows] == numbers[near]
    return near[match], rows[match]


def _sum_histograms(histograms: Iterable[np.ndarray], request: DigitRequest) -> np.ndarray:
    total = np.zeros((len(request.prefixes), 1 << request.width), np.int64)
    for histogram in histograms:
        total += histogram
    return total


class _Search(NamedTuple):
    """A rank on its way down: `skip` of the `num_samples` under `prefix` (-1: not counted) lie before it."""

    prefix: int
    skip: int
    num_samples: int


def _check_counts(is_first: bool, searches: dict[int, _Search], counts: dict[int, int]) -> None:
    """Refuse ranks beyond the samples, and shards that do not hold what they held one digit before."""
    for rank, search in searches.items():
        count = counts[search.prefix]
        if is_first and not 0 <= rank <= count:
            raise ValueError(f"rank {rank} lies beyond the {count} samples that the shards hold")
        if not is_first and search.num_samples != count:
            raise ValueError(
                f"the shards counted {search.num_samples} samples in a bin and {count} the next time; "
                "they must not change during the search, and num_ids must exceed every sample id"
            )


def _narrow(search: _Search, before: np.ndarray) -> _Search:
    """Follow a search into one bin, given the inclusive cumulative counts (bins,) int64 under its prefix.

    The rank behind all samples gets the bin one beyond the last, with nothing to skip.
    """
    digit = int(np.searchsorted(before, search.skip, side="right"))
    passed = int(before[digit - 1]) if digit else 0
    count = int(before[digit]) - passed if digit < before.size else 0
    return _Search(search.prefix * before.size + digit, search.skip - passed, count)


def _edge_to_cut(number: int, key_bits: int) -> Cut:
    """Turn the lower edge of a bin into a cut."""
    key, sample_id = divmod(number, MAX_SAMPLE_IDS)
    return Cut(key, sample_id) if key < 1 << key_bits else Cut((1 << key_bits) - 1, MAX_SAMPLE_IDS)
