"""One step of SGD with a cosine schedule, for proxy training, SimCLR and evaluation from scratch.

A step over several ranks and micro-batches has the gradient of the mean loss over the global batch's real rows:

    set_learning_rate(optimizer, cosine_lr(step, total_steps, base_lr, min_lr))
    for i, batch in enumerate(micro_batches):
        logits, loss = forward_backward(model, *batch, is_last=i == len(micro_batches) - 1, ...)
    update(optimizer, scaler)
"""

import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from elfs_ray.methods.numeric.precision import AUTOCAST_DTYPES, Precision

_MAX_UNCHECKED_LOSSES = 8  # steps that a GPU may be ahead of the check


def make_optimizer(
    model: nn.Module, *, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = True
) -> torch.optim.SGD:
    """Return SGD on every parameter of `model`, which must be on its device already, as one fused kernel.

    Raises ValueError for rates that torch refuses: a negative one, or Nesterov without momentum.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    if momentum:
        # The fused kernel allocates velocities in the first step without clearing them. Where fp16 overflows and skips
        # that step, they would stay whatever the memory held.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def data_parallel(model: nn.Module, group: distributed.ProcessGroup | None = None) -> DistributedDataParallel:
    """Wrap `model` to average gradients over a group's workers, rounded the same in every step of every process."""
    # By default DDP regroups the gradients into new buckets after the first step. With three or more workers, the order
    # of an all-reduce's additions depends on a gradient's place in its bucket, so that the first step after a resume
    # would round differently from the same step of an undisturbed run. The search for unused parameters keeps the
    # first buckets; torch warns of its cost in a worker's log.
    return DistributedDataParallel(model, process_group=group, find_unused_parameters=True)


def make_grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler that fp16 needs, or one that does nothing. Its state belongs in checkpoints."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def cosine_lr(step: int, total_steps: int, base_lr: float, min_lr: float = 1e-4, warmup_steps: int = 0) -> float:
    """Return the learning rate of a step in [0, total_steps): half a cosine from `base_lr` towards `min_lr`.

    The first `warmup_steps` rise linearly to `base_lr` instead, the first of them at base_lr / warmup_steps.
    Raises ValueError where the rates or the steps are out of order.
    """
    if not 0 <= min_lr <= base_lr:
        raise ValueError(f"min_lr is {min_lr} and base_lr {base_lr}; they must satisfy 0 <= min_lr <= base_lr")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be at least 0 and below total_steps = {total_steps}")
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, *, num_real: int, world_size: int = 1
) -> torch.Tensor:
    """Return a micro-batch's part of the mean cross-entropy over the `num_real` real rows of a global batch.

    The parts add up over micro-batches and average over ranks, as DDP averages gradients, to that mean.
    logits: (b, c) of any float type. targets: (b,) int64. mask: (b,) bool, False for rows that do not count.
    Returns a scalar float32.
    """
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    # DDP divides the sum of the ranks' gradients by their number: the factor world_size undoes that. where() instead of
    # a product, as 0 · inf of a masked row would be NaN.
    return torch.where(mask, losses, 0.0).sum() * (world_size / num_real)


def forward_backward(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_real: int,
    is_last: bool,
    scaler: torch.amp.GradScaler,
    precision: Precision = "fp32",
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a micro-batch's gradient to that of its step; ranks exchange gradients with the last micro-batch only.

    images: (b, c, h, w) float32; targets, mask, num_real, world_size: see `masked_cross_entropy`.
    Returns logits (b, num_classes) of the training forward pass and the scalar loss, both detached.
    """
    without_exchange = getattr(model, "no_sync", nullcontext)  # DDP has it, compiled or not
    dtype = AUTOCAST_DTYPES[precision]
    with nullcontext() if is_last else without_exchange():
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(images)
        loss = masked_cross_entropy(logits, targets, mask, num_real=num_real, world_size=world_size)
        scaler.scale(loss).backward()
    return logits.detach(), loss.detach()


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Apply the accumulated gradient and drop it; with fp16, skip the step where it overflowed."""
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _PendingLoss:
    value: torch.Tensor
    copied: torch.cuda.Event | None
    num_real: int
    where: str


class LossMonitor:
    """The sum of an epoch's losses, and a check that each is finite, without waiting for a GPU in every step.

    On a GPU a loss is copied to the host in the background and checked once it has arrived, at most 8 steps later; on a
    CPU it is checked at once.
    """

    def __init__(self) -> None:
        self._pending: deque[_PendingLoss] = deque()
        self._sum = 0.0
        self._num_real = 0

    def add(self, loss: torch.Tensor, *, num_real: int, epoch: int, step: int, lr: float) -> None:
        """Add a step's scalar loss, the sum over its micro-batches; `num_real` is its weight in the epoch's mean.

        Raises FloatingPointError naming epoch, step and learning rate of the first loss that is NaN or infinite.
        """
        where = f"epoch {epoch}, step {step}, learning rate {lr:g}"
        value, copied = loss.detach(), None
        if loss.is_cuda:
            # item() would make the host wait for the step. Only a copy into pinned memory is asynchronous, and the
            # event tells when it has arrived.
            value = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_PendingLoss(value, copied, num_real, where))
        while self._pending and (self._has_arrived(self._pending[0]) or len(self._pending) > _MAX_UNCHECKED_LOSSES):
            self._check(self._pending.popleft())

    def finish(self) -> float:
        """Return the mean loss since the last call, each step weighted by its real rows; raises as `add` does.

        With several ranks the mean of this over ranks is the mean over the epoch's samples.
        """
        self._check_all()
        mean = self._sum / self._num_real
        self._sum, self._num_real = 0.0, 0
        return mean

    def state(self) -> tuple[float, int]:
        """Return the sum of the losses since `finish`, each weighted by its real rows, and the number of these rows.

        Raises as `add` does.
        """
        self._check_all()
        return self._sum, self._num_real

    def load_state(self, loss_sum: float, num_real: int) -> None:
        """Go on from a sum and its rows."""
        self._sum, self._num_real = loss_sum, num_real

    def _check_all(self) -> None:
        while self._pending:
            self._check(self._pending.popleft())

    @staticmethod
    def _has_arrived(pending: _PendingLoss) -> bool:
        return pending.copied is None or pending.copied.query()

    def _check(self, pending: _PendingLoss) -> None:
        if pending.copied is not None:
            pending.copied.synchronize()
        loss = pending.value.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at {pending.where}; lower the learning rate, warm it up, "
                "or train in fp32 or bf16 if this was fp16"
            )
        self._sum += loss * pending.num_real
        self._num_real += pending.num_real
