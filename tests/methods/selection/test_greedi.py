"""Coverage in partitions, against the selection from the whole pool, and its properties."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, facility_location, highest_similarity


def digit_embeddings():
    pixels = load_digits().data
    return (pixels - pixels.mean(0)).astype(np.float16)


def select(embeddings, budget, sample=slice(None), groups=None):
    """Select from a pool whose ids are 10, 20, 30, ...; return positions and gains."""
    ids = np.arange(len(embeddings)) * 10 + 10
    parts = greedi.partitions(len(ids))
    candidates, share = greedi.num_candidates(len(parts)), -(-budget // len(parts))
    rows = greedi.Rows(embeddings, ids, groups)
    nominees = [greedi.nominate(rows.where(part), candidates, share) for part in map(as_slice, parts)]
    merged = greedi.merge(nominees, rows.where(sample), budget)
    return merged.sample_ids // 10 - 1, merged.gains


def as_slice(rows):
    return slice(rows.start, rows.stop)


@pytest.mark.parametrize("num_samples", [1, 19_999, 20_000, 20_001, 1_281_167])
def test_partitions_are_equal_and_hold_every_sample_once(num_samples):
    parts = greedi.partitions(num_samples)
    assert [position for part in parts for position in (part.start, part.stop)][1:-1:2] == [p.start for p in parts[1:]]
    assert parts[0].start == 0
    assert parts[-1].stop == num_samples
    sizes = [len(part) for part in parts]
    assert max(sizes) <= 20_000
    assert max(sizes) - min(sizes) <= 1


def test_the_choice_covers_nearly_as_well_as_the_one_from_the_whole_pool(monkeypatch):
    """Digits of five partitions; what random samples cover is the lower end of the scale."""
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 400)
    digits = digit_embeddings()
    order, _ = select(digits, 100)
    whole = facility_location(digits, 100).order
    chance = np.random.default_rng(0).permutation(len(digits))
    for budget in (10, 30, 100):
        ours, best, random = (
            highest_similarity(digits, digits[each[:budget]]).mean() / SIMILARITY_ONE for each in (order, whole, chance)
        )
        assert ours - random > 0.9 * (best - random)


def test_every_group_is_covered_by_its_members_as_in_the_whole_pool(monkeypatch):
    digits, groups = digit_embeddings(), load_digits().target
    whole = facility_location(digits, 60, groups=groups)
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 400)
    order, gains = select(digits, 60, groups=groups)
    assert set(groups[order[:10]]) == set(range(10))
    assert gains.sum() > 0.98 * whole.gains.sum()


def test_every_sample_is_selected_once_and_every_smaller_selection_is_a_prefix(monkeypatch):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 400)
    digits = digit_embeddings()
    sample = slice(0, 1797, 3)
    order, gains = select(digits, 1797, sample)
    assert sorted(order) == list(range(1797))
    assert (np.diff(gains) <= 0).all()
    for budget in (1, 100, 900):
        part, part_gains = select(digits, budget, sample)
        np.testing.assert_array_equal(part, order[:budget])
        np.testing.assert_array_equal(part_gains, gains[:budget])


def test_equal_samples_are_selected_by_their_rank_in_their_partition_and_then_by_id(monkeypatch):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 4)
    order, gains = select(np.ones((10, 3), np.float16), 10)
    # Partitions 0-2, 3-5 and 6-9. The first sample covers all; the others follow, first all of rank 0.
    assert order.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8, 9]
    assert gains[1:].tolist() == [0] * 9


@pytest.mark.parametrize(
    ("left", "budget", "share"),
    [([4, 4, 4], 6, 2), ([4, 4, 4], 7, 3), ([1, 4, 4], 6, 3), ([0, 4, 1], 5, 4), ([0, 0, 2], 1, 1), ([4, 4, 4], 12, 4)],
)
def test_a_share_of_the_budget_makes_up_for_partitions_with_few_left(monkeypatch, left, budget, share):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 4)
    sample_ids = 10 + np.arange(12)
    left_ids = np.concatenate([sample_ids[4 * part : 4 * part + size] for part, size in enumerate(left)])
    assert greedi.share_of(sample_ids, left_ids, budget) == share
    assert sum(min(share, size) for size in left) >= budget
