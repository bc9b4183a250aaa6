"""Training dynamics: which rows each worker takes in each step, and what is recorded of them.

An epoch visits the samples in `epoch_order`; `BatchPlan` cuts that order into global batches and deals these out to
ranks and micro-batches; `DynamicsRecorder` keeps three floats of every sample, from the training forward pass itself
(ELFS, arXiv 2406.04273).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.numeric.hashing import hash_uint64

_ORDER_STREAM = 0x6F726472
_CHUNK_STREAM = 0x63686E6B
NUM_LANES = 64
WINDOW_CHUNKS = 4
_MIN_ROWS = 2  # BatchNorm in training mode refuses a single 1×1 feature map


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits samples: a permutation (num_samples,) int64 from (seed, epoch).

    Memory: 24 bytes a sample while it is made (0.12 s a million), 8 afterwards.
    """
    return np.argsort(hash_uint64(seed, _ORDER_STREAM, epoch, np.arange(num_samples)), kind="stable")


def streamed_order(chunk_sizes: np.ndarray, seed: int, epoch: int, global_batch: int) -> np.ndarray:
    """Return `epoch_order` for images that are read from storage a chunk of adjacent ones at a time.

    chunk_sizes: (k,) integers, the samples in each chunk; chunks hold the samples 0..n-1 in turn. Returns a permutation
    (n,) int64, a function of the arguments alone. Chunks are shuffled and laid end to end in 64 lanes of equal length;
    in a lane, samples are shuffled within windows of 4 chunks. Every global batch takes as many samples of each lane
    and has them in the order of lanes, so that a rank, whose share of each batch is a range, reads the chunks of its
    own lanes and no others. Memory: 41 bytes a sample while it is made (1 s a million), 8 afterwards.
    """
    n, num_chunks = int(chunk_sizes.sum()), len(chunk_sizes)
    num_lanes = min(NUM_LANES, num_chunks)
    lane_length = -(-n // num_lanes)
    window = max(1, WINDOW_CHUNKS * n // num_chunks)

    shuffled = np.argsort(hash_uint64(seed, _CHUNK_STREAM, epoch, np.arange(num_chunks)), kind="stable")
    sizes, firsts = chunk_sizes[shuffled], (np.cumsum(chunk_sizes) - chunk_sizes)[shuffled]
    samples = np.arange(n) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)
    lanes, offsets = np.divmod(np.arange(n), lane_length)
    # The windows of different lanes end at different steps: reading is spread over time.
    offsets += lanes * window // num_lanes
    windows = lanes * (lane_length // window + 2) + offsets // window
    del lanes, offsets
    samples = samples[np.lexsort((hash_uint64(seed, _ORDER_STREAM, epoch, samples), windows))]
    del windows

    places = np.arange(num_lanes * lane_length).reshape(num_lanes, lane_length).T.ravel()
    places = places[places < n]
    padded = np.full(-(-n // global_batch) * global_batch, n)
    padded[:n] = places
    padded = np.sort(padded.reshape(-1, global_batch), axis=1).ravel()
    return samples[padded[:n]]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank puts through the network at once.

    positions: (m,) int64 into the epoch's order. mask: (m,) bool, False for the duplicates that only fill the batch;
    they take part in BatchNorm's statistics, never in the loss or in the records.
    """

    positions: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank: `num_real` counts the global batch's real rows, over all ranks."""

    index: int
    num_real: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Cuts an epoch into global batches, whatever the number of ranks, and deals each out in equal shares.

    Every position is real exactly once an epoch. Every rank has as many steps, micro-batches and rows as any other:
    its share is padded with duplicates from the same global batch, at most one a micro-batch, or up to two rows where
    the last batch has fewer than two for it. Memory: O(global_batch).

    num_samples: positions an epoch. global_batch: real rows a step, over all ranks; the last step takes what is left.
    micro_batch: the most rows a rank puts through the network at once, at least 2; None for its whole share.
    Raises ValueError where a count is out of range.
    """

    num_samples: int
    global_batch: int
    rank: int = 0
    world_size: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch < 1:
            raise ValueError(
                f"num_samples is {self.num_samples} and global_batch {self.global_batch}; both must be at least 1"
            )
        if self.micro_batch is not None and self.micro_batch < _MIN_ROWS:
            raise ValueError(f"micro_batch is {self.micro_batch}; BatchNorm needs at least {_MIN_ROWS} rows")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must be in [0, world_size = {self.world_size})")

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of an epoch, the same on every rank."""
        return -(-self.num_samples // self.global_batch)

    @property
    def num_rows(self) -> int:
        """Return the rows that each rank puts through the network in an epoch, duplicates included."""
        full_steps, tail = divmod(self.num_samples, self.global_batch)
        return full_steps * self._rows_a_step(self.global_batch) + (self._rows_a_step(tail) if tail else 0)

    def steps(self) -> Iterator[Step]:
        """Yield this rank's steps of an epoch, in order."""
        for index in range(self.num_steps):
            start = index * self.global_batch
            num_real = min(self.global_batch, self.num_samples - start)
            yield Step(index, num_real, tuple(self._micro_batches(start, num_real)))

    def _micro_shape(self, num_real: int) -> tuple[int, int]:
        """Return how many micro-batches of how many rows each rank takes of a global batch."""
        share = max(-(-num_real // self.world_size), _MIN_ROWS)
        count = 1 if self.micro_batch is None else -(-share // self.micro_batch)
        return count, max(-(-share // count), _MIN_ROWS)

    def _rows_a_step(self, num_real: int) -> int:
        count, rows = self._micro_shape(num_real)
        return count * rows

    def _micro_batches(self, start: int, num_real: int) -> Iterator[MicroBatch]:
        first = num_real * self.rank // self.world_size
        share = num_real * (self.rank + 1) // self.world_size - first
        count, rows = self._micro_shape(num_real)
        row = np.arange(count * rows)
        positions = start + (first + row) % num_real
        mask = row < share
        for begin in range(0, count * rows, rows):
            yield MicroBatch(positions[begin : begin + rows], mask[begin : begin + rows])


@torch.no_grad()
def record(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what scores are made of, for p = softmax(logits) and y = target, in float32 on the device of the logits.

    logits: (b, c) of any float type. targets: (b,) int64. Returns three tensors (b,) float32: target_prob p_y,
    max_other_prob = max_{j≠y} p_j (0 where c = 1), el2n = ‖onehot(y) − p‖₂.
    """
    residual = torch.softmax(logits, dim=1, dtype=torch.float32)
    columns = targets[:, None]
    target_prob = residual.gather(1, columns)
    # p − onehot(y) is at most 0 at y and at least 0 elsewhere, so its maximum is that of the others.
    residual.scatter_(1, columns, target_prob - 1)
    return target_prob[:, 0], residual.amax(1), torch.linalg.vector_norm(residual, dim=1)


class DynamicsRecorder:
    """Keeps `record` of every row that a rank trains on in an epoch, on the device until the epoch ends.

    num_rows: rows an epoch with duplicates, `BatchPlan.num_rows`. Memory: 12 bytes a row on the device and 9 on the
    host, 45 there in `finish`. `add` waits for nothing on a GPU; `finish` waits once.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self._values = torch.empty(3, num_rows, device=device)
        self._sample_ids = np.empty(num_rows, dtype=np.int64)
        self._mask = np.empty(num_rows, dtype=bool)
        self._num_added = 0

    def add(self, sample_ids: np.ndarray, mask: np.ndarray, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Record a batch. sample_ids: (b,) integers, mask: (b,) bool, on the host; logits (b, c), targets (b,)."""
        rows = slice(self._num_added, self._num_added + len(logits))
        assert rows.stop <= len(self._mask), f"row {rows.stop} of an epoch planned with {len(self._mask)}"
        self._sample_ids[rows] = sample_ids
        self._mask[rows] = mask
        torch.stack(record(logits, targets), out=self._values[:, rows])
        self._num_added = rows.stop

    def finish(self) -> dict[str, np.ndarray]:
        """Return the epoch's records without duplicates, by ascending sample_id, and make room for the next epoch.

        Returns sample_id int64 and target_prob, max_other_prob, el2n float32, each (number of real rows,).
        """
        assert self._num_added == len(self._mask), f"{self._num_added} rows of {len(self._mask)} planned were recorded"
        self._num_added = 0
        real = np.flatnonzero(self._mask)
        real = real[np.argsort(self._sample_ids[real], kind="stable")]
        sample_ids = self._sample_ids[real]
        assert (np.diff(sample_ids) > 0).all(), "a sample was recorded twice in an epoch"
        target_prob, max_other_prob, el2n = self._values.cpu().numpy()[:, real]
        return {"sample_id": sample_ids, "target_prob": target_prob, "max_other_prob": max_other_prob, "el2n": el2n}
