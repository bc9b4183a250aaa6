"""elfs_ray.select: the greedy selection from an array, and what it refuses. Others compare it to runs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import elfs_ray
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, facility_location
from tests.tables import around_mean

DIGITS = load_digits()
EMBEDDINGS = (DIGITS.data[:300] - DIGITS.data[:300].mean(axis=1, keepdims=True)).astype(np.float32)
LABELS = DIGITS.target[:300]


def test_the_ids_are_the_greedy_selection_in_its_order():
    selection = elfs_ray.select(EMBEDDINGS, 25)
    unit = (EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)).astype(np.float16)
    expected = facility_location(around_mean(unit), 25)
    assert selection.ids.tolist() == expected.order.tolist()
    np.testing.assert_allclose(selection.scores, expected.gains / SIMILARITY_ONE, rtol=1e-2)
    assert selection.random_coverage < selection.coverage < 1
    assert not selection.classes_first


def test_every_beginning_is_the_selection_for_a_smaller_budget():
    assert elfs_ray.select(EMBEDDINGS, 60).ids[:15].tolist() == elfs_ray.select(EMBEDDINGS, 0.05).ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tensor_gives_what_its_array_gives(dtype):
    tensor = torch.from_numpy(EMBEDDINGS).to(dtype).requires_grad_()
    expected = elfs_ray.select(tensor.detach().double().numpy(), 25)
    assert elfs_ray.select(tensor, 25).ids.tolist() == expected.ids.tolist()


def test_the_length_of_embeddings_does_not_matter():
    lengths = np.geomspace(1e-3, 1e3, len(EMBEDDINGS))[:, None]
    assert elfs_ray.select(EMBEDDINGS * lengths, 25).ids.tolist() == elfs_ray.select(EMBEDDINGS, 25).ids.tolist()


def test_ids_need_not_ascend():
    order = np.random.default_rng(0).permutation(300)
    ids = 7 * order
    selection = elfs_ray.select(EMBEDDINGS[order], 25, ids=ids, pseudo_labels=LABELS[order])
    assert selection.ids.tolist() == (7 * elfs_ray.select(EMBEDDINGS, 25, pseudo_labels=LABELS).ids).tolist()


@pytest.mark.parametrize("rows", [70, 20_000])
def test_two_rounds_and_excluded_samples(monkeypatch, rows):
    """Excluded samples are as if they were not there; labelled ones cover others and are not selected."""
    monkeypatch.setattr(greedi, "PARTITION_ROWS", rows)
    first = elfs_ray.select(EMBEDDINGS, 10).ids
    second = elfs_ray.select(EMBEDDINGS, 10, labelled=first)
    if rows > 300:
        assert [*first, *second.ids] == elfs_ray.select(EMBEDDINGS, 20).ids.tolist()
        kept = np.setdiff1d(np.arange(300), first)
        expected = elfs_ray.select(EMBEDDINGS[kept], 10, ids=kept)
        assert elfs_ray.select(EMBEDDINGS, 10, exclude=first).ids.tolist() == expected.ids.tolist()
    assert not np.isin(first, second.ids).any() and len(second) == 10
    # So many that a partition has fewer left than its share of the budget.
    excluded = np.setdiff1d(np.arange(60), first)[:40]
    left = elfs_ray.select(EMBEDDINGS, 250, labelled=first, exclude=excluded)
    assert sorted([*left.ids, *first, *excluded]) == list(range(300))


def test_with_a_label_for_each_class_the_whole_pool_is_covered_at_once():
    first = elfs_ray.select(EMBEDDINGS, 10, pseudo_labels=LABELS)
    assert first.classes_first and len(set(LABELS[first.ids])) >= 9
    second = elfs_ray.select(EMBEDDINGS, 10, pseudo_labels=LABELS, labelled=first.ids)
    assert not second.classes_first
    assert second.ids.tolist() == elfs_ray.select(EMBEDDINGS, 10, labelled=first.ids).ids.tolist()


def test_what_is_labelled_and_excluded_still_covers_others():
    selection = elfs_ray.select(EMBEDDINGS, 10, labelled=[3, 5], exclude=[5])
    assert selection.ids.tolist() == elfs_ray.select(EMBEDDINGS, 10, labelled=[3, 5]).ids.tolist()


def test_pseudo_labels_that_look_wrong_are_not_used():
    wrong = np.random.default_rng(0).integers(0, 10, 300)
    selection = elfs_ray.select(EMBEDDINGS, 25, pseudo_labels=wrong)
    assert not selection.classes_first
    assert selection.ids.tolist() == elfs_ray.select(EMBEDDINGS, 25).ids.tolist()


def test_the_repr_says_what_was_selected():
    text = repr(elfs_ray.select(EMBEDDINGS, 6, pseudo_labels=LABELS))
    assert text.startswith(
        "Selection of 6 of 300 samples, covering each pseudo-class, then the whole pool: mean similarity 0."
    )
    assert "with random samples; ids [" in text and text.endswith(", …]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": EMBEDDINGS[0]}, r"embeddings are \(64,\) float32; must be \(n, d\)"),
        ({"embeddings": LABELS[:, None]}, "floating-point numbers"),
        ({"embeddings": EMBEDDINGS * (np.arange(300) != 9)[:, None]}, "embedding of id 9 is zero, NaN or infinite"),
        ({"budget": 301}, "budget is 301 for a pool of 300 samples"),
        ({"budget": 299, "labelled": [1, 2]}, "only 298 samples are neither labelled nor excluded"),
        ({"labelled": [1, 300, 301]}, r"labelled holds id 300, which no sample has \(2 such ids\)"),
        ({"ids": [0] * 300}, "ids hold one id twice"),
        ({"pseudo_labels": LABELS[:9]}, r"pseudo_labels are \(9,\) int64; must be \(300,\) integers"),
        ({"pseudo_labels": LABELS.astype(str)}, "must be .* integers"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        elfs_ray.select(**{"embeddings": EMBEDDINGS, "budget": 10, **change})


def test_it_imports_no_ray():
    script = "import sys, elfs_ray; elfs_ray.select; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout == "False\n"
