"""Score how hard each sample was for the proxy network, from its training dynamics, one epoch at a time.

A worker makes one `ScoreAccumulator` for its samples and feeds it every epoch in order; it never holds more than one
epoch. p_y is the probability of the pseudo-label and p_o the largest other one; a prediction is right when p_y > p_o.

    aum             Σ over epochs of p_y - p_o                                    float32   low is hard
    forgetting      times a right prediction turned wrong; for samples never
                    right the number of epochs, more than any such count          int32     high is hard
    never_learned   never predicted right                                         bool
    el2n            Σ over the first 10 epochs of ‖onehot(y) - p‖₂                float32   high is hard
    correctness     epochs predicted right                                        int32     low is hard
    coarse_entropy  entropy of (p_y, p_o, rest) in the last epoch, in nats        float32   high is hard
    dual            mean over windows of 10 epochs, in the first 30, of
                    10 · std(p_y) · (1 - mean p_y)                                float32   high is hard
    dual_mean_prob  mean of p_y over the first 30 epochs                          float32   (for `dual_beta_keys`)

Sources (arXiv): AUM 2001.10528 (with probabilities in place of logits, as in ELFS 2406.04273), forgetting 1812.05159,
EL2N 2107.07075, DUAL 2502.06905, whose std is that of a sample (divisor 9). The full prediction is not recorded, so the
entropy of 1906.11829 is not available: with all other classes lumped together, coarse_entropy is a lower bound of it,
low by at most rest · ln(classes - 2), and exact for up to three classes.

Short runs: el2n and dual_mean_prob use the epochs there are. With fewer than 10 epochs DUAL has one window of all
epochs; with a single epoch nothing varies, and it is 0 for every sample.
"""

import numpy as np

from elfs_ray.methods.selection.quantiles import Direction

EL2N_EPOCHS = 10
DUAL_EPOCHS = 30
DUAL_WINDOW = 10

SCORES: dict[str, Direction] = {
    "aum": "low",
    "forgetting": "high",
    "el2n": "high",
    "correctness": "low",
    "coarse_entropy": "high",
    "dual": "high",
}
"""The scores to select by, with the end of the range where hard samples lie."""

_BLOCK = 1 << 16  # samples whose DUAL window is held in float64 at a time: keeps it out of the memory formula
_PROBABILITY_ROUNDING = 1e-5  # exp(log_softmax) may exceed 1 by this much; it counts as 1


class ScoreAccumulator:
    """The scores of one set of samples, fed epoch by epoch.

    sample_ids: the samples to score, increasing, (n,) int64 or a range; a worker's share of the pool, gaps allowed.
    Sums are float64 and only the results are rounded to float32, so that many small margins do not vanish.
    Memory: 97 bytes per sample (40 of them the DUAL window, freed after epoch 30), and about as much as four columns of
    the epoch that is being added.
    """

    def __init__(self, sample_ids: np.ndarray | range) -> None:
        ids = np.asarray(sample_ids, np.int64)
        assert (ids[1:] > ids[:-1]).all(), "sample_ids must increase strictly"
        self.sample_ids = ids
        self.num_epochs = 0
        self._aum = np.zeros(ids.size)
        self._el2n = np.zeros(ids.size)
        self._forgetting = np.zeros(ids.size, np.int32)
        self._correctness = np.zeros(ids.size, np.int32)
        self._was_right = np.zeros(ids.size, bool)
        self._last_probs = np.zeros((2, ids.size), np.float32)
        self._dual = np.zeros(ids.size)
        self._prob_sum = np.zeros(ids.size)
        self._window = np.zeros((DUAL_WINDOW, ids.size), np.float32)

    def add_epoch(
        self, sample_ids: np.ndarray, target_prob: np.ndarray, max_other_prob: np.ndarray, el2n: np.ndarray
    ) -> None:
        """Add all records of the next epoch, in any order of samples.

        sample_ids: (n,) integers, exactly the accumulator's; the others: (n,) float32.
        Raises ValueError, and adds nothing, for values that are not finite, which means that training diverged.
        """
        # Workers record samples in the order in which they trained on them.
        source = np.argsort(sample_ids)
        assert np.array_equal(sample_ids[source], self.sample_ids), f"epoch {self.num_epochs} has other samples"
        for name, column in (("target_prob", target_prob), ("max_other_prob", max_other_prob), ("el2n", el2n)):
            num_bad = column.size - np.count_nonzero(np.isfinite(column))
            if num_bad:
                raise ValueError(
                    f"epoch {self.num_epochs}: {name} is NaN or infinite for {num_bad} of {column.size} samples: "
                    "training diverged; lower train.lr and train again"
                )
        for prob in (target_prob, max_other_prob):
            assert prob.min() >= 0 and prob.max() <= 1 + _PROBABILITY_ROUNDING, "not probabilities"
        self._update(np.minimum(target_prob[source], 1), np.minimum(max_other_prob[source], 1), el2n[source])

    def finish(self) -> dict[str, np.ndarray]:
        """Return the scores by name, each (n,) in the order of sample_ids; see the top of the file."""
        assert self.num_epochs, "scores need at least one epoch"
        # A sample that was never right was never forgotten either. It is the hardest, so it scores above any count.
        never_learned = self._correctness == 0
        return {
            "aum": self._aum.astype(np.float32),
            "forgetting": np.where(never_learned, np.int32(self.num_epochs), self._forgetting),
            "never_learned": never_learned,
            "el2n": self._el2n.astype(np.float32),
            "correctness": self._correctness.copy(),
            "coarse_entropy": _coarse_entropy(*self._last_probs).astype(np.float32),
            "dual": self._mean_dual().astype(np.float32),
            "dual_mean_prob": (self._prob_sum / min(self.num_epochs, DUAL_EPOCHS)).astype(np.float32),
        }

    def _update(self, target_prob: np.ndarray, max_other_prob: np.ndarray, el2n: np.ndarray) -> None:
        self._aum += target_prob.astype(np.float64) - max_other_prob
        if self.num_epochs < EL2N_EPOCHS:
            self._el2n += el2n
        right = target_prob > max_other_prob  # a tie is wrong: argmax could name either class
        self._forgetting += self._was_right & ~right
        self._correctness += right
        self._was_right = right
        self._last_probs[:] = target_prob, max_other_prob
        if self.num_epochs < DUAL_EPOCHS:
            self._prob_sum += target_prob
            # A ring buffer: mean and standard deviation do not depend on the order of a window's epochs.
            self._window[self.num_epochs % DUAL_WINDOW] = target_prob
            if self.num_epochs + 1 >= DUAL_WINDOW:
                _add_window_dual(self._dual, self._window)
        self.num_epochs += 1
        if self.num_epochs == DUAL_EPOCHS:  # the window is not read again: free its 40 bytes per sample
            self._window = np.zeros((0, self.sample_ids.size), np.float32)

    def _mean_dual(self) -> np.ndarray:
        if self.num_epochs >= DUAL_WINDOW:
            return self._dual / (min(self.num_epochs, DUAL_EPOCHS) - DUAL_WINDOW + 1)
        dual = np.zeros(self.sample_ids.size)
        if self.num_epochs > 1:
            _add_window_dual(dual, self._window[: self.num_epochs])
        return dual


def _add_window_dual(dual: np.ndarray, window: np.ndarray) -> None:
    """Add 10 · std(p_y) · (1 - mean p_y) of a window, (epochs, n) float32 with epochs in any order, to dual."""
    for begin in range(0, dual.size, _BLOCK):
        probs = window[:, begin : begin + _BLOCK].astype(np.float64)
        dual[begin : begin + _BLOCK] += 10 * probs.std(axis=0, ddof=1) * (1 - probs.mean(axis=0))


def _coarse_entropy(target_prob: np.ndarray, max_other_prob: np.ndarray) -> np.ndarray:
    """Return the entropy (n,) float64 of each (p_y, p_o, 1 - p_y - p_o), in nats."""
    # Rounded probabilities can add up to a little more than 1: the rest must not be negative. 0 · log 0 counts as 0.
    known = np.clip(np.stack([target_prob, max_other_prob]).astype(np.float64), 0.0, 1.0)
    probs = np.concatenate([known, np.clip(1 - known.sum(axis=0, keepdims=True), 0.0, 1.0)])
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(axis=0)
