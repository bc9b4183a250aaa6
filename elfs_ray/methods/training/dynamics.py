"""Training dynamics: which samples each worker takes in each step, and what is recorded of them.

An epoch visits the samples in `epoch_order`. `BatchPlan` cuts that order into global batches and deals these out to
ranks and micro-batches. `DynamicsRecorder` keeps three floats of every sample, from the training forward pass itself
(ELFS, arXiv 2406.04273).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.numeric.hashing import hash_uint64

_ORDER_STREAM = 0x6F726472
_CHUNK_STREAM = 0x63686E6B
NUM_LANES = 64  # the most ranks that can read chunks of their own
WINDOW_CHUNKS = 4  # how many chunks a lane shuffles together, and so holds in memory
_MIN_ROWS = 2  # BatchNorm in training mode refuses a single row of 1×1 feature maps


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits samples: a permutation (num_samples,) int64 from (seed, epoch).

    Memory: 24 bytes per sample while it is made (0.12 s per million), 8 afterwards.
    """
    return np.argsort(hash_uint64(seed, _ORDER_STREAM, epoch, np.arange(num_samples)), kind="stable")


def streamed_order(chunk_sizes: np.ndarray, seed: int, epoch: int, global_batch: int) -> np.ndarray:
    """Return the order of an epoch for images that are read from storage in chunks of adjacent ones.

    chunk_sizes: (k,) integers, the number of samples in each chunk; chunks hold the samples 0..n-1 in turn. Returns a
    permutation (n,) int64, a function of the arguments alone. Chunks are shuffled and laid end to end in 64 lanes of
    equal length; within a lane, samples are shuffled in windows of 4 chunks. Every global batch takes equally many
    samples from each lane, in the order of lanes. A rank's share of each batch is a range, so that it reads the chunks
    of its lanes and no others. Memory: 41 bytes per sample while it is made (1 s per million), 8 afterwards.
    """
    n, num_chunks = int(chunk_sizes.sum()), len(chunk_sizes)
    num_lanes = min(NUM_LANES, num_chunks)
    lane_length = -(-n // num_lanes)
    window = max(1, WINDOW_CHUNKS * n // num_chunks)

    shuffled = np.argsort(hash_uint64(seed, _CHUNK_STREAM, epoch, np.arange(num_chunks)), kind="stable")
    sizes, firsts = chunk_sizes[shuffled], (np.cumsum(chunk_sizes) - chunk_sizes)[shuffled]
    samples = np.arange(n) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)
    lanes, offsets = np.divmod(np.arange(n), lane_length)
    # Shifted by a share of a window per lane, windows end at different steps, which spreads reading over time.
    offsets += lanes * window // num_lanes
    windows = lanes * (lane_length // window + 2) + offsets // window
    del lanes, offsets  # at 8 bytes a sample each array counts in the memory of large pools
    samples = samples[np.lexsort((hash_uint64(seed, _ORDER_STREAM, epoch, samples), windows))]
    del windows

    # Read the lanes in parallel, one sample of each in turn. The last lane may be short: drop its places past the end.
    places = np.arange(num_lanes * lane_length).reshape(num_lanes, lane_length).T.ravel()
    places = places[places < n]
    # Sort the places within every global batch, so that each batch lists its samples lane by lane. The padding, larger
    # than any place, stays at the end of the last batch.
    padded = np.full(-(-n // global_batch) * global_batch, n)
    padded[:n] = places
    padded = np.sort(padded.reshape(-1, global_batch), axis=1).ravel()
    return samples[padded[:n]]


@dataclass(frozen=True)
class MicroBatch:
    """The rows that one rank puts through the network at once.

    positions: (m,) int64 into the epoch's order. mask: (m,) bool, False for duplicates that only fill the batch; these
    take part in BatchNorm's statistics, but not in the loss or the records.
    """

    positions: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank; `num_real` is the number of real rows of the global batch, over all ranks."""

    index: int
    num_real: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class BatchPlan:
    """A division of an epoch into global batches, the same for any number of ranks, and of each into equal shares.

    Every position is real exactly once per epoch. All ranks have the same number of steps, micro-batches and rows, as
    ranks that disagree would wait for each other forever. A share is padded with duplicates from the same global batch,
    at most one per micro-batch, or up to two rows where the last batch has fewer than two for a rank.
    Memory: O(global_batch).

    num_samples: positions per epoch. global_batch: real rows per step, over all ranks; the last step takes the rest.
    micro_batch: the most rows that a rank puts through the network at once, at least 2; None for its whole share.
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
        """Return the number of optimizer steps in an epoch, the same on every rank."""
        return -(-self.num_samples // self.global_batch)

    @property
    def num_rows(self) -> int:
        """Return the number of rows that each rank puts through the network in an epoch, duplicates included."""
        full_steps, tail = divmod(self.num_samples, self.global_batch)
        return full_steps * self._rows_a_step(self.global_batch) + (self._rows_a_step(tail) if tail else 0)

    def num_rows_before(self, step: int) -> int:
        """Return the number of rows that each rank puts through the network before a step of an epoch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"  # all but the last step are full
        return step * self._rows_a_step(self.global_batch)

    def steps(self, first: int = 0) -> Iterator[Step]:
        """Yield this rank's steps of an epoch from step `first` on, in order."""
        for index in range(first, self.num_steps):
            start = index * self.global_batch
            num_real = min(self.global_batch, self.num_samples - start)
            yield Step(index, num_real, tuple(self._micro_batches(start, num_real)))

    def _micro_shape(self, num_real: int) -> tuple[int, int]:
        """Return the number of micro-batches that each rank takes of a global batch, and the rows of each."""
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
        # Rows past the share repeat samples of the same global batch, so that its statistics stay its own.
        positions = start + (first + row) % num_real
        mask = row < share
        for begin in range(0, count * rows, rows):
            yield MicroBatch(positions[begin : begin + rows], mask[begin : begin + rows])


@torch.no_grad()
def record(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the quantities from which scores are computed, for p = softmax(logits) and y = target.

    logits: (b, c) of any float type. targets: (b,) int64. Returns three (b,) float32 on the device of the logits:
    target_prob p_y, max_other_prob = max_{j≠y} p_j (0 where c = 1), el2n = ‖onehot(y) − p‖₂.
    """
    residual = torch.softmax(logits, dim=1, dtype=torch.float32)
    columns = targets[:, None]
    target_prob = residual.gather(1, columns)
    # p − onehot(y) is at most 0 at y and at least 0 elsewhere, so its maximum is that of the other classes: one tensor
    # serves both the maximum and the norm.
    residual.scatter_(1, columns, target_prob - 1)
    return target_prob[:, 0], residual.amax(1), torch.linalg.vector_norm(residual, dim=1)


class DynamicsRecorder:
    """The records of every row that a rank trains on in an epoch, kept on the device until the epoch ends.

    num_rows: rows per epoch with duplicates, `BatchPlan.num_rows`. On a GPU `add` does not wait for the device, and
    `finish` waits once. Memory: 12 bytes per row on the device and 9 on the host, 45 there in `finish`.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self._values = torch.empty(3, num_rows, device=device)
        self._sample_ids = np.empty(num_rows, dtype=np.int64)
        self._mask = np.empty(num_rows, dtype=bool)
        self._num_added = 0
        self._earlier: list[dict[str, np.ndarray]] = []

    def resume(self, num_rows: int, records: list[dict[str, np.ndarray]]) -> None:
        """Go on after the first `num_rows` rows of an epoch, whose records another recorder or several have made."""
        self._mask[:num_rows] = False
        self._num_added, self._earlier = num_rows, records

    def add(self, sample_ids: np.ndarray, mask: np.ndarray, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Record a batch: sample_ids (b,) integers and mask (b,) bool on the host, logits (b, c) and targets (b,)."""
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
        records = self.records()
        self._num_added, self._earlier = 0, []
        return records

    def records(self) -> dict[str, np.ndarray]:
        """Return the same as `finish` for the rows so far, and change nothing."""
        real = np.flatnonzero(self._mask[: self._num_added])
        real = real[np.argsort(self._sample_ids[real], kind="stable")]
        target_prob, max_other_prob, el2n = self._values.cpu().numpy()[:, real]
        records = {
            "sample_id": self._sample_ids[real],
            "target_prob": target_prob,
            "max_other_prob": max_other_prob,
            "el2n": el2n,
        }
        if self._earlier:
            parts = [*self._earlier, records]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in records}
            order = np.argsort(joined["sample_id"], kind="stable")
            records = {name: values[order] for name, values in joined.items()}
        assert (np.diff(records["sample_id"]) > 0).all(), "a sample was recorded twice in an epoch"
        return records
