"""The linear probe vs. scikit-learn's logistic regression, on real digits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from elfs_ray.methods.training.linear_probe import L2_PENALTY, fit_linear_probe
from elfs_ray.methods.training.networks import EMBEDDING_LENGTH


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    return unit.astype(np.float16), labels


@pytest.mark.parametrize("count", [20, 1000])
def test_agrees_with_logistic_regression_of_the_same_penalty(digits, count):
    embeddings, labels = digits
    train, test = embeddings[:count], embeddings[-500:]
    probe = fit_linear_probe(train, labels[:count], 10)
    # scikit-learn minimizes C · sum of cross-entropies + half the squared weights, and does not penalize biases either.
    reference = LogisticRegression(C=1 / (2 * count * L2_PENALTY), max_iter=5000, tol=1e-6)
    reference.fit(EMBEDDING_LENGTH * train.astype(np.float64), labels[:count])
    expected = reference.predict_proba(EMBEDDING_LENGTH * test.astype(np.float64))
    errors = np.abs(probe.probs(test).numpy() - expected)
    assert errors.mean() < 1e-3 and errors.max() < 0.02
    assert probe.accuracy(test, labels[-500:]) == pytest.approx(reference.score(16.0 * test, labels[-500:]), abs=0.004)


def test_the_same_arguments_give_the_same_weights(digits):
    embeddings, labels = digits
    first, second = (fit_linear_probe(embeddings[:300], labels[:300], 10) for _ in range(2))
    assert torch.equal(first.weights, second.weights)


def test_classes_without_an_example_are_never_predicted(digits):
    embeddings, labels = digits
    probe = fit_linear_probe(embeddings[labels < 5], labels[labels < 5], 10)
    assert probe.probs(embeddings).argmax(1).max() < 5


@pytest.mark.parametrize("wrong", [[10] * 5, [-1] * 5, []])
def test_labels_out_of_range_are_refused(digits, wrong):
    with pytest.raises(ValueError, match=r"in \[0, 10\)"):
        fit_linear_probe(digits[0][: len(wrong)], np.array(wrong, np.int64), 10)
