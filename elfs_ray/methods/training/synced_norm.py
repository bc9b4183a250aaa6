"""Batch normalisation over the batches of all workers, on CPUs too: torch's own works on GPUs alone.

A contrastive network sees one global batch, however many workers share it: with statistics of their own, workers would
normalise each other's negatives differently, and two would not give the loss of one.
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional


def synchronize_batch_norms(model: nn.Module, group: distributed.ProcessGroup, device: torch.device) -> nn.Module:
    """Give every batch norm of `model` the statistics of the group's global batch; names and weights stay.

    Workers may hold different numbers of rows, or none.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(model, name, SyncedBatchNorm(child, group))
        else:
            synchronize_batch_norms(child, group, device)
    return model


class SyncedBatchNorm(nn.BatchNorm2d):
    """The batch norm `norm`, its parameters and buffers shared, with statistics over all workers of a group."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, group: distributed.ProcessGroup):
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self._group = group

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (b, c) or (b, c, h, w); the same shape."""
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            return functional.batch_norm(
                rows, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        mean, variance, num_values = self.statistics(rows.float())
        return _Normalize.apply(rows.float(), self.weight, self.bias, mean, variance, num_values, self.eps, self._group)

    @torch.no_grad()
    def statistics(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mean (c,) and biased variance (c,) over all workers, which move the running ones; how many values each has.

        rows (b, c) or (b, c, h, w) float32; b may be 0. One exchange of 2·c + 1 floats.
        """
        num_own = rows.numel() // rows.shape[1]
        if num_own:
            # On a CPU a thirtieth of torch.var_mean's time.
            mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
        else:
            variance = mean = rows.new_zeros(rows.shape[1])
        own = torch.cat([rows.new_tensor([num_own]), mean, variance * num_own])
        gathered = [torch.empty_like(own) for _ in range(self._group.size())]
        distributed.all_gather(gathered, own, group=self._group)
        counts, means, squares = torch.stack(gathered).split([1, len(mean), len(mean)], dim=1)
        num_values = counts.sum()
        mean = (counts * means).sum(0) / num_values
        variance = (squares + counts * (means - mean).square()).sum(0) / num_values

        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (num_values / (num_values - 1).clamp(min=1)), self.momentum)
        return mean, variance, float(num_values)


class _Normalize(torch.autograd.Function):
    """Batch norm (Ioffe and Szegedy, arXiv 1502.03167) with statistics over a group, and its gradient over the group.

    The gradient is that of the sum of all workers' losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        num_values: float,
        eps: float,
        group: distributed.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, mean, variance)
        ctx.num_values, ctx.eps, ctx.group = num_values, eps, group
        return functional.batch_norm(rows, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, mean, variance = ctx.saved_tensors
        (gradient,) = gradients
        # With statistics that are given: the gradient times weight·scale, and this worker's sums for weight and bias.
        if rows.numel():
            of_rows, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, rows, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            of_rows, of_weight, of_bias = (torch.zeros_like(like) for like in (rows, weight, weight))
        everyones = torch.stack([of_weight, of_bias])
        distributed.all_reduce(everyones, group=ctx.group)
        # Less what the statistics had of these rows: an affine map of the normalised rows, so a batch norm itself.
        scale = -weight * torch.rsqrt(variance + ctx.eps)
        along, constant = scale * everyones / ctx.num_values
        of_rows += functional.batch_norm(rows, mean, variance, along, constant, False, 0.0, ctx.eps)
        return of_rows, of_weight, of_bias, None, None, None, None, None
