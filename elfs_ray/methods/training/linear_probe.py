"""A linear probe: logistic regression on embeddings that are not trained, as self-supervised encoders are compared by.

It takes seconds where a network takes hours, and says what labels are worth to somebody who classifies by the same
embeddings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from elfs_ray.methods.training.networks import EMBEDDING_LENGTH

L2_PENALTY = 1e-3  # times the sum of squared weights, beside the mean cross-entropy
_MAX_ITERATIONS = 500
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of embeddings: weights (d, classes) and biases (classes,), float32."""

    weights: torch.Tensor
    biases: torch.Tensor

    @torch.inference_mode()
    def probs(self, embeddings: np.ndarray) -> torch.Tensor:
        """Return the class probabilities (n, classes) float32 of unit-length embeddings (n, d)."""
        return torch.cat([self._logits(rows).softmax(1) for rows in _in_parts(embeddings)])

    @torch.inference_mode()
    def accuracy(self, embeddings: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of unit-length embeddings (n, d) whose most probable class is their label, (n,) integers."""
        predicted = torch.cat([self._logits(rows).argmax(1) for rows in _in_parts(embeddings)])
        return float((predicted.cpu().numpy() == labels).mean())

    def _logits(self, rows: np.ndarray) -> torch.Tensor:
        return _scaled(rows, self.weights.device) @ self.weights + self.biases


def fit_linear_probe(
    embeddings: np.ndarray, labels: np.ndarray, num_classes: int, *, device: str = "cpu"
) -> LinearProbe:
    """Fit a probe on unit-length embeddings (n, d) and labels (n,) in [0, num_classes), by L-BFGS from zero weights.

    A function of its arguments alone, up to rounding. Memory: 4·n·(d + 3·classes) bytes. Raises ValueError for labels
    out of range.
    """
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be {len(embeddings)} integers in [0, {num_classes}), one for each embedding")
    inputs = _scaled(embeddings, torch.device(device))
    targets = torch.from_numpy(labels.astype(np.int64)).to(device)
    weights = torch.zeros(inputs.shape[1], num_classes, device=device, requires_grad=True)
    biases = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, biases], max_iter=_MAX_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(inputs @ weights + biases, targets) + L2_PENALTY * weights.square().sum()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    return LinearProbe(weights.detach(), biases.detach())


def _scaled(embeddings: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return embeddings as float32 of length 16, at which logits of useful size need no large weights."""
    return torch.from_numpy(embeddings.astype(np.float32)).to(device) * EMBEDDING_LENGTH


def _in_parts(embeddings: np.ndarray) -> list[np.ndarray]:
    return [embeddings[start : start + _ROWS_AT_ONCE] for start in range(0, len(embeddings), _ROWS_AT_ONCE)]
