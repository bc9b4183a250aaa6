import numpy as np
import pytest

from elfs_ray.methods.selection.quantiles import (
    ID_BITS,
    KEY_BITS,
    Cut,
    DigitRequest,
    assign_parts,
    count_digits,
    grouped_keys,
    hard_first_order,
    hardness_keys,
    part_ranks,
    rank_to_cut,
)


def split(keys, ids, num_shards, seed=0):
    """Deal samples to shards at random; some shards may be empty."""
    owner = np.random.default_rng(seed).integers(0, num_shards, keys.size)
    return [(keys[owner == shard], ids[owner == shard]) for shard in range(num_shards)]


def find_cuts(shards, ranks, num_ids):
    return rank_to_cut(lambda request: (count_digits(request, *shard) for shard in shards), ranks, num_ids)


def in_window(keys, ids, lower, upper):
    return assign_parts(keys, ids, [lower, upper]) == 0


def sorted_pairs(keys, ids):
    return sorted(zip(keys.tolist(), ids.tolist(), strict=True))


def scores_with_ties(rng, n):
    return rng.choice(np.array([-1.5, -0.25, 0.0, 0.25, 3.0], np.float32), n) + rng.choice([0, 0, 0, 1e-6], n).astype(
        np.float32
    )


def test_ascending_keys_are_hard_first_for_both_directions_and_dtypes():
    rng = np.random.default_rng(0)
    floats = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-40, 38, 500), [0.0, 3.4e38, -3.4e38]])
    for scores in (floats.astype(np.float32), rng.integers(-(2**31), 2**31, 500).astype(np.int32)):
        low, high = hardness_keys(scores, "low"), hardness_keys(scores, "high")
        assert low.dtype == high.dtype == np.uint32
        np.testing.assert_array_equal(np.argsort(low, kind="stable"), np.argsort(scores, kind="stable"))
        np.testing.assert_array_equal(scores[np.argsort(high)], np.sort(scores)[::-1])


def test_negative_zero_is_as_hard_as_zero():
    keys = hardness_keys(np.array([-0.0, 0.0, np.float32(-1e-45)], np.float32), "low")
    assert keys[0] == keys[1] > keys[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_position(bad):
    with pytest.raises(ValueError, match=r"1 of 3 scores are NaN or infinite, the first at position 1"):
        hardness_keys(np.array([0.5, bad, 1.0], np.float32), "low")


def test_another_dtype_or_direction_is_refused():
    with pytest.raises(ValueError, match="float64"):
        hardness_keys(np.zeros(2), "low")
    with pytest.raises(ValueError, match="'hard'"):
        hardness_keys(np.zeros(2, np.float32), direction="hard")


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 3, 100, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_each_cut_has_exactly_its_rank_of_samples_before_it(n, num_shards, ties):
    rng = np.random.default_rng(n + num_shards)
    scores = scores_with_ties(rng, n) if ties else rng.standard_normal(n).astype(np.float32)
    keys, ids = hardness_keys(scores, "low"), rng.permutation(n)
    ranks = sorted({0, n, *rng.integers(0, n + 1, 8).tolist()})
    pairs = sorted_pairs(keys, ids)
    cuts = find_cuts(split(keys, ids, num_shards), ranks, n)
    for rank, cut in zip(ranks, cuts, strict=True):
        assert [pair for pair in pairs if pair < tuple(cut)] == pairs[:rank]


@pytest.mark.parametrize("spread", [1, 2**15, 2**17, 2**31, 2**39])
def test_ties_are_cut_by_ids_of_any_length(spread):
    ids = np.arange(300, dtype=np.int64)[::-1] * spread
    keys = np.full(300, 12345, np.uint32)
    [cut] = find_cuts(split(keys, ids, 3), [117], 300 * spread)
    assert np.count_nonzero(in_window(keys, ids, Cut(0, 0), cut)) == 117
    assert ids[in_window(keys, ids, Cut(0, 0), cut)].max() == 116 * spread


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("direction", ["low", "high"])
def test_a_window_over_any_number_of_shards_equals_sorting_and_slicing(n, direction):
    rng = np.random.default_rng(n)
    scores, ids = scores_with_ties(rng, n), rng.permutation(2 * n)[:n]
    signed = scores if direction == "low" else -scores
    order = np.lexsort((ids, signed))
    keys = hardness_keys(scores, direction)
    windows = [(0, n), (n // 3, n // 2), (n - n // 10, n), (n // 2, n // 2)]
    for num_shards in range(1, 8):
        shards = split(keys, ids, num_shards)
        cuts = find_cuts(shards, [rank for window in windows for rank in window], 2 * n)
        for (start, stop), lower, upper in zip(windows, cuts[::2], cuts[1::2], strict=True):
            kept = [ids[in_window(keys, ids, lower, upper)] for keys, ids in shards]
            assert set(np.concatenate(kept)) == set(ids[order[start:stop]])


def test_the_extreme_keys_are_kept_by_a_window_that_reaches_the_ends():
    keys = np.array([0, 2**32 - 1, 2**32 - 1, 7], np.uint32)
    ids = np.array([0, 2**48 - 1, 5, 6])
    lower, upper = find_cuts([(keys, ids)], [0, 4], 2**48)
    assert in_window(keys, ids, lower, upper).all()
    [cut] = find_cuts([(keys, ids)], [3], 2**48)
    np.testing.assert_array_equal(in_window(keys, ids, lower, cut), [True, False, True, True])


def test_cuts_do_not_depend_on_how_samples_are_dealt_to_shards():
    rng = np.random.default_rng(4)
    keys, ids = hardness_keys(scores_with_ties(rng, 3000), "high"), rng.permutation(3000)
    alone = find_cuts([(keys, ids)], [17, 900, 2999], 3000)
    for seed in range(5):
        assert find_cuts(split(keys, ids, 4, seed), [17, 900, 2999], 3000) == alone


def test_histograms_of_blocks_add_up_to_the_histogram_of_the_shard():
    rng = np.random.default_rng(5)
    n = 600_000  # more than two internal chunks
    keys, ids = rng.integers(0, 2**18, n).astype(np.uint32), np.arange(n)
    id_request = DigitRequest(32, 16, (5, 77, 2**17))
    for request in (DigitRequest(ID_BITS + 16, 16, (0,)), DigitRequest(ID_BITS, 16, (0, 3)), id_request):
        whole = count_digits(request, keys, ids)
        blocks = [count_digits(request, keys[part], ids[part]) for part in (slice(0, 1000), slice(1000, None))]
        np.testing.assert_array_equal(whole, blocks[0] + blocks[1])
    first, second = count_digits(DigitRequest(ID_BITS, 16, (0, 3)), keys, ids)
    np.testing.assert_array_equal(first, np.bincount(keys[keys < 2**16], minlength=2**16))
    np.testing.assert_array_equal(second, np.bincount(keys[keys >> 16 == 3] & 0xFFFF, minlength=2**16))


def test_each_shard_is_asked_at_most_four_times_for_four_billion_ids():
    keys, ids = np.full(70_000, 9, np.uint32), np.arange(70_000)
    digits = []

    def gather(request):
        digits.append((request.shift, request.width))
        yield count_digits(request, keys, ids)

    [cut] = rank_to_cut(gather, [66_001], 70_000)
    assert digits == [(64, 16), (48, 16), (1, 16), (0, 1)]
    assert cut == Cut(9, 66_001)


def test_parts_of_a_window_give_every_sample_its_rank_even_when_all_tie():
    rng = np.random.default_rng(6)
    for scores in (scores_with_ties(rng, 2000), np.zeros(2000, np.float32)):
        keys, ids = hardness_keys(scores, "low"), rng.permutation(2000)
        start, count, num_parts = 321, 1001, 4
        shards = split(keys, ids, 5)
        ranks = part_ranks(start, count, num_parts)
        cuts = find_cuts(shards, ranks, 2000)
        collected = [[] for _ in range(num_parts)]
        for shard_keys, shard_ids in shards:
            parts = assign_parts(shard_keys, shard_ids, cuts)
            for part in range(num_parts):
                collected[part].append((shard_keys[parts == part], shard_ids[parts == part]))
        by_rank = {}
        for part, pieces in enumerate(collected):
            part_keys, part_ids = (np.concatenate(column) for column in zip(*pieces, strict=True))
            assert part_ids.size == ranks[part + 1] - ranks[part]
            order = hard_first_order(part_keys, part_ids)
            by_rank |= {ranks[part] - start + place: part_ids[at] for place, at in enumerate(order)}
        expected = [sample_id for _, sample_id in sorted_pairs(keys, ids)[start : start + count]]
        assert [by_rank[rank] for rank in range(count)] == expected


def test_no_part_holds_what_lies_outside_the_window():
    keys, ids = np.array([1, 2, 2, 2, 3], np.uint32), np.arange(5)
    parts = assign_parts(keys, ids, [Cut(2, 2), Cut(2, 3), Cut(3, 4)])
    np.testing.assert_array_equal(parts, [-1, -1, 0, 1, -1])


def test_a_rank_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="rank 4 lies beyond the 3 samples"):
        find_cuts([(np.arange(3, dtype=np.uint32), np.arange(3))], [4], 3)
    with pytest.raises(ValueError, match="rank -1"):
        find_cuts([(np.arange(3, dtype=np.uint32), np.arange(3))], [-1], 3)


def test_a_sample_held_by_two_shards_is_named_when_it_lies_at_a_boundary():
    shard = (np.full(3, 8, np.uint32), np.array([4, 5, 6]))
    with pytest.raises(ValueError, match=r"sample ids \[5\] are held more than once"):
        find_cuts([shard, shard], [3], 10)


def test_ids_beyond_the_stated_number_are_noticed():
    keys, ids = np.full(10, 8, np.uint32), np.arange(10) + 70_000
    with pytest.raises(ValueError, match="num_ids must exceed every sample id"):
        find_cuts([(keys, ids)], [5], 10)


@pytest.mark.parametrize("num_groups", [1, 3, 40, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_one_search_cuts_every_group_as_sorting_each_alone_does(num_groups, ties):
    rng = np.random.default_rng(num_groups)
    n = 20_000
    scores = scores_with_ties(rng, n) if ties else rng.standard_normal(n).astype(np.float32)
    groups, ids = rng.integers(0, num_groups, n), rng.permutation(n)
    keys = grouped_keys(groups, hardness_keys(scores, "low"))
    counts = np.bincount(groups, minlength=num_groups)
    first = np.cumsum(counts) - counts
    ranks = np.stack([first + counts // 4, first + counts // 2], 1).ravel().tolist()
    widest = []

    def gather(request):
        widest.append(len(request.prefixes) << request.width)
        return (count_digits(request, *shard) for shard in split(keys, ids, 3))

    cuts = rank_to_cut(gather, ranks, n, key_bits=KEY_BITS + (num_groups - 1).bit_length())
    kept = assign_parts(keys, ids, cuts) % 2 == 0
    expected = []
    for group in range(num_groups):
        members = np.flatnonzero(groups == group)
        order = members[np.lexsort((ids[members], scores[members]))]
        expected += order[members.size // 4 : members.size // 2].tolist()
    assert set(np.flatnonzero(kept)) == set(expected)
    assert max(widest) <= 2**22


def test_a_group_that_does_not_fit_above_the_key_is_refused():
    with pytest.raises(ValueError, match=r"groups range from -1 to 2; they must lie in \[0, 65536\)"):
        grouped_keys(np.array([-1, 2]), np.zeros(2, np.uint32))
