"""BADGE vs. k-means++ over gradient embeddings that are written out."""

import numpy as np
import pytest
import torch

from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.methods.selection import badge
from elfs_ray.methods.selection.badge import badge_selection
from tests.tables import digit_images

NUM_SAMPLES, NUM_CLASSES = 300, 10


def network_outputs(num_samples: int = NUM_SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of real digits, (n, 64), and the probabilities that a linear layer makes of them."""
    images, _ = digit_images(num_samples)
    features = torch.from_numpy(images.reshape(num_samples, -1) / np.float32(255)).float()
    layer = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (features.shape[1], NUM_CLASSES))).float()
    return features, torch.softmax(features @ layer, dim=1)


def plain_badge(features: torch.Tensor, probs: torch.Tensor, count: int, seed: int) -> list[int]:
    """k-means++ over the (n, classes · d) gradients, in float64, one distance after another."""
    h, p = features.double().numpy(), probs.double().numpy()
    gradients = np.stack([np.outer(p[i] - np.eye(NUM_CLASSES)[p[i].argmax()], h[i]).ravel() for i in range(len(h))])
    picked = [int(np.linalg.norm(gradients, axis=1).argmax())]
    for pick in range(1, count):
        squared = np.min([((gradients - gradients[i]) ** 2).sum(1) for i in picked], axis=0)
        target = float(hash_uniform(seed, badge._PICK_STREAM, pick)) * squared.sum()
        picked.append(int(np.flatnonzero(np.cumsum(squared) > target)[0]))
    return picked


@pytest.mark.parametrize("seed", [0, 1])
def test_the_factors_pick_what_the_whole_gradients_do(seed):
    features, probs = network_outputs()
    assert badge_selection(features, probs, 60, seed).tolist() == plain_badge(features, probs, 60, seed)


def test_every_sample_is_picked_once_and_smaller_budgets_are_prefixes():
    features, probs = network_outputs()
    everything = badge_selection(features, probs, NUM_SAMPLES, 0)
    assert sorted(everything.tolist()) == list(range(NUM_SAMPLES))
    assert badge_selection(features, probs, 20, 0).tolist() == everything[:20].tolist()
    assert badge_selection(features, probs, 20, 1).tolist() != everything[:20].tolist()


def test_copies_of_a_sample_are_taken_last():
    features, probs = (torch.cat([rows, rows]) for rows in network_outputs(50))
    picked = badge_selection(features, probs, 80, 0) % 50
    assert len(set(picked[:50].tolist())) == 50
    assert len(set(badge_selection(torch.ones(6, 3), torch.full((6, 2), 0.5), 6, 0).tolist())) == 6


def test_sure_predictions_have_no_gradient_and_count_as_one_sample():
    features, probs = network_outputs()
    probs[: NUM_SAMPLES // 2] = torch.eye(NUM_CLASSES)[0]
    assert (badge_selection(features, probs, 100, 0) < NUM_SAMPLES // 2).sum() <= 1


@pytest.mark.parametrize(
    ("features", "probs", "count", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 2), 1, "must be"),
        (torch.ones(4), torch.ones(4, 2), 1, "must be"),
        (torch.ones(4, 3), torch.ones(4, 2), 5, "count is 5 of 4 samples"),
        (torch.ones(4, 3), torch.ones(4, 2), 0, "must be 1 to all"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(features, probs, count, message):
    with pytest.raises(ValueError, match=message):
        badge_selection(features, probs, count, 0)
