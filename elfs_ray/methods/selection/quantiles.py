"""Select exactly by rank over any number of shards, without sorting the pool.

Samples are ordered hard-first: by an order-preserving integer key of their score, ties by sample_id. (key, sample_id)
is read as one number, and the number at a given rank is found by radix selection: a histogram over the first digit,
then one over the next digit of the boundary bin alone, and so on until the rank falls on the edge of a bin. The driver
of the search sees histograms, never samples.

A shard is anything that can answer `count_digits(request, keys, sample_ids)` for the samples it holds:

    keys = hardness_keys(scores, direction)                          # on each worker
    gather = lambda request: (count_digits(request, keys, ids) for keys, ids in shards)
    lower, upper = rank_to_cut(gather, [start, start + count], num_ids)
    kept = assign_parts(keys, ids, [lower, upper]) == 0              # on each worker

Groups (pseudo-classes, strata) need no search of their own: `grouped_keys` puts the group above the key, so that every
group is a range of ranks, and one search finds the cuts of all. The more bins a search follows, the shorter its digits:
a thousand groups take three more requests of 32 MiB, not a thousand histograms.

A sample's position in the window (0 = the hardest kept) needs no global sort either. Cut the window at the ranks
`part_ranks(start, count, num_parts)`, find each sample's part by `assign_parts`, and sort every part i on its own by
`hard_first_order`; its positions begin at `ranks[i] - start`. Parts differ in size by one sample at most, ties or not.
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

_DIGIT_BITS = 16  # of a search for a few ranks: two digits a key, 0.5 MiB a histogram
_FEW_RANKS = 64
_REQUEST_BITS = 22  # a request for many ranks has 2**22 bins in all: 32 MiB
_COARSE_BITS = 16  # a table of 2**16 entries stays in a CPU's cache
_FEW_CUTS = 16
_CHUNK = 1 << 18  # samples counted at a time: keeps temporaries in the cache and out of the memory formula
_SIGN_BIT = np.uint32(1 << 31)


class Cut(NamedTuple):
    """A place between two samples of the hard-first order: every smaller (key, sample_id) lies before it."""

    key: int
    sample_id: int


class DigitRequest(NamedTuple):
    """A request for histograms of a digit: `width` bits of key · 2**48 + sample_id, with `shift` bits below them.

    It counts the samples whose bits above the digit are one of `prefixes`, increasing; for the first digit just 0.
    """

    shift: int
    width: int
    prefixes: tuple[int, ...]

    @property
    def reads_ids(self) -> bool:
        """Return True where the digit is part of the sample_id, not of the key."""
        return self.shift < ID_BITS


def hardness_keys(scores: np.ndarray, direction: Direction) -> np.ndarray:
    """Map scores to uint32 keys whose ascending order is hard-first; equal scores, 0.0 and -0.0 too, get equal keys.

    scores: (n,) float32 or int32, the types in which they are stored. direction: the end where hard samples lie.
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
        # IEEE 754 numbers of one sign order as their bits do. Flipping all bits of the negative ones and the sign bit
        # of the others makes the order of unsigned integers that of the numbers; `bits >> 31` is all ones if negative.
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
    larger than memory can be counted block by block. Memory: 8 bytes per bin, which is 0.5 MiB per prefix for digits of
    16 bits, and a few MiB besides the arrays.
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
    exclusive upper bound of the sample ids (their number, if dense), which saves passes over digits that are zero.
    key_bits: 32, or 32 plus the bits of the largest group for `grouped_keys`.
    Raises ValueError for ranks beyond the samples, ids beyond 2**48 and sample ids held twice at a boundary.
    Memory: 1 MiB per distinct boundary bin (at most one per rank) for up to 64 ranks, else 64 MiB in all for up to a
    million ranks, whatever the number of samples and shards.
    """
    if not 0 < num_ids <= MAX_SAMPLE_IDS:
        raise ValueError(f"num_ids is {num_ids}; it must be one more than the largest sample id, at most 2**48")
    used_id_bits = max(1, (num_ids - 1).bit_length())
    cuts: dict[int, Cut] = {}
    searches = {rank: _Search(prefix=0, skip=rank, num_samples=-1) for rank in ranks}
    left = key_bits + ID_BITS
    while searches and left:
        if left == ID_BITS:
            # The keys are done, so ties remain. The leading bits of all ids are zero: skip them without a request.
            left, zero_bits = used_id_bits, ID_BITS - used_id_bits
            searches = {rank: search._replace(prefix=search.prefix << zero_bits) for rank, search in searches.items()}
        prefixes = tuple(sorted({search.prefix for search in searches.values()}))
        # A digit never spans key and id, so that requests for the key need not read the ids.
        width = min(_digit_width(len(ranks), len(prefixes)), left - ID_BITS if left > ID_BITS else left)
        left -= width
        request = DigitRequest(left, width, prefixes)
        before = np.cumsum(_sum_histograms(gather(request), request), axis=1)
        is_first = left + width == key_bits + ID_BITS
        _check_counts(is_first, searches, dict(zip(prefixes, before[:, -1].tolist(), strict=True)))
        rows = dict(zip(prefixes, before, strict=True))
        searches = {rank: _narrow(search, rows[search.prefix]) for rank, search in searches.items()}
        # With nothing left to skip, the rank lies on the lower edge of its bin, however many samples share the bin.
        cuts |= {
            rank: _edge_to_cut(search.prefix << left, key_bits) for rank, search in searches.items() if not search.skip
        }
        searches = {rank: search for rank, search in searches.items() if search.skip}
    _check_unique(searches)
    return [cuts[rank] for rank in ranks]


def part_ranks(start: int, count: int, num_parts: int) -> list[int]:
    """Return the num_parts + 1 ranks that cut the window [start, start + count) into parts of almost equal size."""
    return [start + count * part // num_parts for part in range(num_parts + 1)]


def assign_parts(keys: np.ndarray, sample_ids: np.ndarray, cuts: Sequence[Cut]) -> np.ndarray:
    """Return, for each sample, the i with cuts[i] <= sample < cuts[i + 1], or -1 outside all cuts: (n,) int32.

    keys: (n,) uint32 or uint64; sample_ids: (n,) int64; cuts: at least two, in hard-first order.
    """
    cut_keys = np.array([cut.key for cut in cuts], keys.dtype)
    cut_ids = np.array([cut.sample_id for cut in cuts], np.int64)
    if len(cuts) <= _FEW_CUTS:  # comparing with each cut is several times faster than a binary search
        parts = np.full(keys.size, -1, np.int32)
        for cut_key in cut_keys:
            parts += keys >= cut_key
    else:
        parts = np.searchsorted(cut_keys, keys, side="right").astype(np.int32) - 1
    # So far only keys were compared. A sample with the key of a cut lies before the cut if its id is smaller; several
    # cuts may share a key, so repeat until no sample moves.
    tied = np.flatnonzero(cut_keys[np.maximum(parts, 0)] == keys)
    while tied.size:
        tied = tied[sample_ids[tied] < cut_ids[parts[tied]]]
        parts[tied] -= 1
        tied = tied[(parts[tied] >= 0) & (cut_keys[parts[tied]] == keys[tied])]
    parts[parts == len(cuts) - 1] = -1
    return parts


def _digit_width(num_ranks: int, num_prefixes: int) -> int:
    """Return the bits of the next digit: 16 for a few ranks, else as many as keep all bins within a request's size."""
    if num_ranks <= _FEW_RANKS:
        return _DIGIT_BITS
    return max(1, _REQUEST_BITS - (num_prefixes - 1).bit_length())


def _key_digits(counts: np.ndarray, request: DigitRequest, keys: np.ndarray) -> None:
    """Add to counts a digit of the keys whose bits above it are one of the prefixes."""
    kind = keys.dtype.type  # numpy shifts unsigned integers only by integers of their own type
    shift = request.shift - ID_BITS
    # The first digit: every sample counts, and bincount is several times faster than np.add.at.
    if request.prefixes == (0,) and keys.size and not (keys >> kind(shift)).max() >> request.width:
        counts += np.bincount(keys >> kind(shift), minlength=counts.size)
        return
    above = keys >> kind(shift + request.width)
    matches, rows = _rows_among(np.array(request.prefixes, np.uint64), above)
    digits = (keys[matches] >> kind(shift)) & kind((1 << request.width) - 1)
    np.add.at(counts, (rows << request.width) + digits.astype(np.int64), 1)


def _id_digits(counts: np.ndarray, request: DigitRequest, keys: np.ndarray, sample_ids: np.ndarray) -> None:
    """Add to counts a digit of the ids of samples whose key, and id above that digit, make one of the prefixes."""
    above_bits = ID_BITS - request.shift - request.width
    split = [divmod(prefix, 1 << above_bits) for prefix in request.prefixes]
    boundary_keys, key_rows = np.unique(np.array([key for key, _ in split], np.uint64), return_inverse=True)
    id_prefixes = np.array([id_prefix for _, id_prefix in split], np.uint64)
    near, rows_of_keys = _rows_among(boundary_keys, keys)
    ids = sample_ids[near].astype(np.uint64)
    # A grouped key of 48 bits and an id of 48 do not fit 64 bits together, but the row of the key does in its place.
    prefixes = (key_rows.astype(np.uint64) << np.uint64(above_bits)) | id_prefixes
    above = (rows_of_keys.astype(np.uint64) << np.uint64(above_bits)) | (ids >> np.uint64(ID_BITS - above_bits))
    matches, rows = _rows_among(prefixes, above)
    digits = (ids[matches] >> np.uint64(request.shift)) & np.uint64((1 << request.width) - 1)
    np.add.at(counts, (rows << request.width) + digits.astype(np.int64), 1)


def _rows_among(wanted: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find which numbers (n,) are among `wanted` (p,) uint64, increasing; return their positions and rows in it."""
    # Few samples lie in a boundary bin. A table of leading bits rejects most others before the slower binary search.
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
    """The search for a rank: `skip` of the `num_samples` samples (-1: not counted yet) under `prefix` lie before it."""

    prefix: int
    skip: int
    num_samples: int


def _check_counts(is_first: bool, searches: dict[int, _Search], counts: dict[int, int]) -> None:
    """Raise ValueError for ranks beyond the samples, and for shards that changed since the digit before."""
    for rank, search in searches.items():
        count = counts[search.prefix]
        if is_first and not 0 <= rank <= count:
            raise ValueError(f"rank {rank} lies beyond the {count} samples that the shards hold")
        if not is_first and search.num_samples != count:
            raise ValueError(
                f"the shards counted {search.num_samples} samples in a bin, then {count} in the same bin; they must "
                "not change during the search, and num_ids must exceed every sample id"
            )


def _check_unique(searches: dict[int, _Search]) -> None:
    """Raise ValueError for searches that no digit decided: one (key, sample_id) is held by several samples."""
    if searches:
        repeated = sorted({search.prefix % MAX_SAMPLE_IDS for search in searches.values()})
        raise ValueError(
            f"sample ids {repeated[:5]} are held more than once among the shards, but every sample must have one "
            "score; look for a scores file that was read twice"
        )


def _narrow(search: _Search, before: np.ndarray) -> _Search:
    """Narrow a search to one bin, from the inclusive cumulative counts (bins,) int64 under its prefix.

    The rank after all samples gets the bin one beyond the last, with nothing to skip.
    """
    digit = int(np.searchsorted(before, search.skip, side="right"))
    passed = int(before[digit - 1]) if digit else 0
    count = int(before[digit]) - passed if digit < before.size else 0
    return _Search(search.prefix * before.size + digit, search.skip - passed, count)


def _edge_to_cut(number: int, key_bits: int) -> Cut:
    """Return the cut at the lower edge of a bin."""
    # The edge after the last bin has no key of key_bits: the cut is then behind every id of the largest key.
    key, sample_id = divmod(number, MAX_SAMPLE_IDS)
    return Cut(key, sample_id) if key < 1 << key_bits else Cut((1 << key_bits) - 1, MAX_SAMPLE_IDS)
