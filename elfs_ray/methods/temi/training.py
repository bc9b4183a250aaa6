"""Train the heads of TEMI: a step for all heads at once, an epoch, and the choice of the head to keep.

    trainer = TemiTrainer(settings, input_dim, steps_per_epoch(n, settings), seed)
    for epoch in range(settings.num_epochs):
        head_losses = train_epoch(trainer, embeddings, neighbors, seed, epoch)
    labels = trainer.assign(torch.from_numpy(embeddings), pick_head(head_losses))

With a `process_group`, the same lines on every worker train on one global batch.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from elfs_ray.methods.numeric.hashing import hash_uint64, hash_uniform
from elfs_ray.methods.temi.heads import TemiHeads, TemiSettings
from elfs_ray.methods.temi.loss import cluster_log_probs, pair_weights, temi_loss

_ORDER_STREAM, _NEIGHBOR_STREAM = 2, 3  # 1 is the initialization's in heads.py

# Half-precision gradients of a loss averaged over heads and samples would underflow. Scaling by a power of two rounds
# nothing, so that dividing by it afterwards restores the gradients exactly.
_LOSS_SCALE = 2.0**14

# A CPU trains as many heads together as have this size of hidden activations. Larger ones would leave the cache between
# two operations, and the memory is slower than the arithmetic.
_PART_BYTES = 8 << 20


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to momentum · teacher + (1 − momentum) · student, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)


@torch.no_grad()
def update_marginal(
    marginal: Tensor, teacher_log_probs: Tensor, momentum: float, process_group: dist.ProcessGroup | None = None
) -> None:
    """Move the (H, C) marginal towards the teacher's mean over both views and all workers, in place.

    `teacher_log_probs` is (H, 2, b, C). Every worker must hold the same number of samples.
    """
    batch_mean = teacher_log_probs.exp().mean(dim=(1, 2))
    # A worker's own mean would let the marginals, and with them the losses, of workers drift apart.
    _all_reduce_mean(batch_mean, process_group)
    marginal.lerp_(batch_mean, 1.0 - momentum)


class TemiTrainer:
    """The student, teacher, marginal and optimizer of all heads, and the step that updates them.

    With a process group every worker calls `train_step` on an equal slice of the global batch, and the step equals the
    one-process step on the global batch up to rounding. A trainer that loads `state_dict` resumes byte for byte.

    `autocast_dtype` (torch.bfloat16 or torch.float16) is the precision of the matrix products; the loss, the marginal
    and the parameters stay float32.
    Memory: 20 bytes a parameter, H·(d·hidden + hidden·bottleneck + bottleneck·C) parameters; activations as in
    `TemiHeads.forward` for twice the batch, and about 32·H·b·C bytes for the loss.
    Raises ValueError where the global batch does not divide by the number of workers.
    """

    def __init__(
        self,
        settings: TemiSettings,
        input_dim: int,
        num_steps_per_epoch: int,
        seed: int,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.settings = settings
        self.device = torch.device(device)
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.num_workers = 1 if process_group is None else dist.get_world_size(process_group)
        if settings.batch_size % self.num_workers:
            raise ValueError(
                f"a global batch of {settings.batch_size} does not split evenly over {self.num_workers} workers; "
                "choose a batch_size that is a multiple of the number of workers"
            )
        self.student = TemiHeads(input_dim, settings, seed).to(self.device)
        # The same seed: the teacher starts as a copy of the student.
        self.teacher = TemiHeads(input_dim, settings, seed).to(self.device).requires_grad_(False)
        self.marginal = torch.full((settings.num_heads, settings.num_clusters), 1 / settings.num_clusters).to(device)
        self.step = 0
        self._autocast_dtype = autocast_dtype
        self._num_warmup_steps = round(settings.num_warmup_epochs * num_steps_per_epoch)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self.student.decayed_parameters(), "weight_decay": settings.weight_decay},
                {"params": self.student.undecayed_parameters(), "weight_decay": 0.0},
            ],
            fused=True,
        )
        # The buffers come first, so that parts take views of gradients that exist.
        self._reduced, self._gradients, self._losses = self._flat_buffers()
        self._parts = [(heads, self.student.part(heads), self.teacher.part(heads)) for heads in self._split_heads()]

    def train_step(self, x: Tensor, x_neighbor: Tensor) -> Tensor:
        """Train all heads on this worker's slice of (b, d) embeddings and their neighbours, of any float dtype.

        Returns the (H,) float32 losses of the global batch before the update, in a tensor that the next step reuses.
        """
        settings = self.settings
        views = torch.cat([x, x_neighbor]).to(self.device, torch.float32)
        with torch.no_grad():
            teacher_log_probs = torch.cat([self._log_probs(teacher, views) for _, _, teacher in self._parts])
        # The order matters: the loss uses a marginal that includes this batch. The weight of a pair is a mean over all
        # heads, so all teachers go before the first student.
        update_marginal(self.marginal, teacher_log_probs, settings.marginal_momentum, self.process_group)
        weight = pair_weights(teacher_log_probs)

        self._gradients.zero_()  # not set to None: backward adds to the views of the flat buffer
        for heads, student, _ in self._parts:
            log_probs = self._log_probs(student, views)
            losses = temi_loss(log_probs, teacher_log_probs[heads], self.marginal[heads], weight, settings.beta)
            (losses.sum() * (_LOSS_SCALE / settings.num_heads)).backward()
            self._losses[heads] = losses.detach()
        self._gradients.div_(_LOSS_SCALE)
        # Gradients and losses lie in one buffer: one message per step instead of one per parameter.
        _all_reduce_mean(self._reduced, self.process_group)

        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        update_teacher(self.teacher, self.student, settings.teacher_momentum)
        self.step += 1
        return self._losses

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next step, proportional to the batch: a linear warm-up, then constant."""
        peak = self.settings.learning_rate * self.settings.batch_size / 256
        return peak * min(1.0, (self.step + 1) / max(1, self._num_warmup_steps))

    @torch.no_grad()
    def assign(self, x: Tensor, head: int | None = None) -> Tensor:
        """Assign (n, d) embeddings to clusters by the teacher: return (n,) int64 for one head, or (H, n) for all."""
        x = x.to(self.device, torch.float32)
        if head is None:
            return self.teacher(x).argmax(dim=-1)
        return self.teacher.part(slice(head, head + 1))(x).argmax(dim=-1)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return all that training changes, 16 bytes per parameter: live tensors, to save before the next step."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "marginal": self.marginal,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.marginal.copy_(state["marginal"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _split_heads(self) -> list[slice]:
        """Return the heads that a step trains together: all on a GPU, on a CPU as many as fit its cache."""
        settings = self.settings
        size = settings.num_heads
        if self.device.type == "cpu":
            # Hidden activations in float32, of a sample and its neighbour.
            head_bytes = 4 * 2 * (settings.batch_size // self.num_workers) * settings.hidden_dim
            size = min(size, max(1, _PART_BYTES // head_bytes))
        return [slice(first, first + size) for first in range(0, settings.num_heads, size)]

    def _log_probs(self, heads: TemiHeads, views: Tensor) -> Tensor:
        dtype = self._autocast_dtype
        with torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext():
            logits = heads(views)
        return cluster_log_probs(logits, self.settings.temperature).unflatten(1, (2, -1))

    def _flat_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return one buffer for the all-reduce, and its parts: gradients, which backward fills by views, and losses."""
        parameters = list(self.student.parameters())
        num_gradients = sum(p.numel() for p in parameters)
        flat = torch.zeros(num_gradients + self.settings.num_heads, device=self.device)
        gradients, losses = flat[:num_gradients], flat[num_gradients:]
        for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        return flat, gradients, losses


def train_epoch(
    trainer: TemiTrainer, embeddings: np.ndarray | Tensor, neighbors: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """Train for one epoch and return the mean loss of every head, (H,) float64.

    `embeddings` is (n, d): an array, a memory map or a tensor on the trainer's device. `neighbors` is (n, k) sample
    ids, self excluded. Every worker reads its slice of each global batch. Memory: 8·n bytes for the order.
    """
    loss_sum = torch.zeros(trainer.settings.num_heads, dtype=torch.float64, device=trainer.device)
    num_steps = 0
    share = trainer.settings.batch_size // trainer.num_workers
    for batch in epoch_batches(len(embeddings), trainer.settings.batch_size, seed, epoch):
        ids = batch[trainer.rank * share : (trainer.rank + 1) * share]
        partners = sample_neighbors(neighbors, ids, seed, epoch)
        loss_sum += trainer.train_step(torch.as_tensor(embeddings[ids]), torch.as_tensor(embeddings[partners]))
        num_steps += 1
    return (loss_sum / num_steps).cpu().numpy()


def steps_per_epoch(num_samples: int, settings: TemiSettings) -> int:
    """Return the number of full global batches in an epoch. Raises ValueError where there are none."""
    if num_samples < settings.batch_size:
        raise ValueError(
            f"{num_samples} samples do not fill one batch of {settings.batch_size}; lower batch_size to "
            f"{num_samples} or less"
        )
    return num_samples // settings.batch_size


def epoch_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yield the (batch_size,) int64 sample ids of every global batch of an epoch, a function of (seed, epoch).

    The samples left over after the last full batch are left out; every epoch leaves out different ones.
    """
    key = int(hash_uint64(seed, _ORDER_STREAM, epoch))
    order = np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)
    for start in range(0, num_samples - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def sample_neighbors(neighbors: np.ndarray, sample_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Sample one of the `neighbors` (n, k) of each sample, (b,), as a function of (seed, epoch, sample_id)."""
    uniform = hash_uniform(seed, _NEIGHBOR_STREAM, epoch, sample_ids)
    return neighbors[sample_ids, (uniform * neighbors.shape[1]).astype(np.int64)]


def pick_head(head_losses: np.ndarray) -> int:
    """Return the head with the lowest mean training loss of the last epoch, from (H,) losses; ties to the lowest head.

    Raises ValueError where a loss is not finite.
    """
    if not np.isfinite(head_losses).all():
        bad = np.flatnonzero(~np.isfinite(head_losses)).tolist()
        raise ValueError(
            f"training diverged: the losses of heads {bad} are not finite. Lower learning_rate, or train in fp32 or "
            "bf16"
        )
    return int(np.argmin(head_losses))


class ClusteringCollapseError(ValueError):
    """Raised for a clustering that puts nearly all samples in one cluster, or leaves most clusters empty."""


def check_clustering_collapse(cluster_sizes: np.ndarray, max_share: float = 0.95, min_used_share: float = 0.5) -> None:
    """Raise ClusteringCollapseError where a clustering with these (C,) cluster sizes carries no information.

    That is where one cluster holds more than `max_share` of the samples, or fewer than `min_used_share` of the
    clusters are in use.
    """
    largest_share = cluster_sizes.max() / cluster_sizes.sum()
    num_used = np.count_nonzero(cluster_sizes)
    if largest_share > max_share or num_used < min_used_share * len(cluster_sizes):
        raise ClusteringCollapseError(
            f"the clustering collapsed: {num_used} of {len(cluster_sizes)} clusters are in use and the largest holds "
            f"{largest_share:.1%} of {cluster_sizes.sum()} samples (allowed: {max_share:.0%}; in use at least "
            f"{min_used_share:.0%}). Train longer or with a lower learning_rate, check that embeddings differ from "
            "each other, or use k-means"
        )


def _all_reduce_mean(x: Tensor, process_group: dist.ProcessGroup | None) -> None:
    if process_group is not None:
        dist.all_reduce(x, group=process_group)
        x.div_(dist.get_world_size(process_group))
