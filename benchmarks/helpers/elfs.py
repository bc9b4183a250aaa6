"""Select by ELFS without Ray: training dynamics of a linear proxy on pseudo-labels, AUM, and the double-end window."""

import numpy as np
import torch
from torch.nn import functional

from elfs_ray.methods.selection.hard_fraction import count_difficulty, estimate_risks, least_risk
from elfs_ray.methods.selection.pruning import window_start
from elfs_ray.methods.selection.scores import ScoreAccumulator
from elfs_ray.methods.training.dynamics import epoch_order, record
from elfs_ray.methods.training.networks import build_linear_model
from elfs_ray.methods.training.sgd import cosine_lr, make_optimizer, set_learning_rate

EPOCHS, BATCH, LR = 60, 256, 0.1


def proxy_scores(embeddings: np.ndarray, labels: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Train a linear proxy on pseudo-labels; return AUM and the mean probability of the label, (2, n) float32."""
    n, dim = embeddings.shape
    inputs, targets = torch.from_numpy(embeddings.astype(np.float32)), torch.from_numpy(labels)
    torch.manual_seed(seed)
    model = build_linear_model(dim, num_clusters)
    optimizer = make_optimizer(model, lr=LR)
    accumulator = ScoreAccumulator(range(n))
    steps = -(-n // BATCH)
    for epoch in range(EPOCHS):
        order = epoch_order(n, seed, epoch)
        records = []
        for step in range(steps):
            set_learning_rate(optimizer, cosine_lr(epoch * steps + step, EPOCHS * steps, LR))
            rows = torch.from_numpy(order[step * BATCH : (step + 1) * BATCH])
            optimizer.zero_grad()
            logits = model(inputs[rows])
            functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            records.append(torch.stack(record(logits.detach(), targets[rows])))
        accumulator.add_epoch(order, *torch.cat(records, 1).numpy())
    scores = accumulator.finish()
    return np.stack([scores["aum"], scores["dual_mean_prob"]])


def double_end(scores: np.ndarray, num_clusters: int, count: int) -> np.ndarray:
    """Return positions (count,) int64 of the window of AUM with the hard fraction of least risk, the hardest first."""
    aum, mean_prob = scores
    bounds = float(aum.min()), float(aum.max())
    sums = count_difficulty(aum, np.zeros(len(aum), np.int64), mean_prob, bounds, "low", 1)
    start = window_start(len(aum), count, least_risk(estimate_risks(sums, count, num_clusters)))
    return np.argsort(aum, kind="stable")[start : start + count]
