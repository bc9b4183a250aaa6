"""TEMI: deep clustering of embeddings with many heads trained side by side (Adaloglou et al., BMVC 2023).

Every head is a small student and teacher that learn to give a sample and its neighbour the same cluster. All heads
are one batched module: a step is a few large matrix products, however many heads there are, or one such step for each
of its parts, whose activations then stay in a CPU's cache. training.py trains them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elfs_ray.methods.numeric.hashing import hash_uint64

_INIT_STREAM = 1


@dataclass(frozen=True)
class TemiSettings:
    """Hyperparameters of TEMI; the defaults are the paper's, `CPU_PROFILE` holds what differs on a few cores.

    The batch is the global one, `learning_rate` is for a batch of 256 and scaled in proportion, and with `pca_dim` the
    caller projects the embeddings (`fit_pca`, `project`) before they reach the trainer.
    """

    num_clusters: int
    num_heads: int = 50
    hidden_dim: int = 512
    bottleneck_dim: int = 256
    num_epochs: int = 200
    num_warmup_epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    temperature: float = 0.1
    beta: float = 0.6
    teacher_momentum: float = 0.996
    marginal_momentum: float = 0.9
    pca_dim: int | None = None

    def __post_init__(self) -> None:
        if self.num_clusters < 2 or self.num_heads < 1 or self.batch_size < 1:
            raise ValueError(
                f"TEMI needs at least 2 clusters, 1 head and a batch of 1; got num_clusters={self.num_clusters}, "
                f"num_heads={self.num_heads}, batch_size={self.batch_size}"
            )


# Heads follow their teacher, and one of momentum 0.996 moves in 250 steps: the paper takes 10,000, a CPU has time for
# a fraction of that. On MNIST a faster teacher was what brought the gain early; the learning rate mattered little.
CPU_PROFILE: dict[str, Any] = {
    "num_heads": 8,
    "num_epochs": 10,
    "num_warmup_epochs": 1,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "teacher_momentum": 0.9,
    "pca_dim": 128,
}


class TemiHeads(nn.Module):
    """H clustering heads as one batched module: Linear, GELU, Linear, L2 normalise, weight-normed Linear (no bias).

    Inputs of unit length are stretched by √d, to coordinates of order 1: the paper feeds encoder outputs before
    normalisation, and the initialisation is for those.
    """

    def __init__(self, input_dim: int, settings: TemiSettings, seed: int = 0):
        super().__init__()
        h, hidden, bottleneck = settings.num_heads, settings.hidden_dim, settings.bottleneck_dim
        generator = torch.Generator().manual_seed(int(hash_uint64(seed, _INIT_STREAM) >> np.uint64(1)))

        def truncated_normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator))

        self.hidden_weight = truncated_normal(h, input_dim, hidden)
        self.hidden_bias = nn.Parameter(torch.zeros(h, 1, hidden))
        self.bottleneck_weight = truncated_normal(h, hidden, bottleneck)
        self.bottleneck_bias = nn.Parameter(torch.zeros(h, 1, bottleneck))
        self.cluster_direction = truncated_normal(h, settings.num_clusters, bottleneck)
        self.cluster_gain = nn.Parameter(torch.ones(h, settings.num_clusters, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, d) unit-length embeddings to (H, b, C) cluster logits.

        Memory: 4·H·b·(2·hidden + 2·bottleneck + C) bytes with gradients.
        """
        x = (x * math.sqrt(x.shape[1])).expand(len(self.hidden_weight), -1, -1)
        hidden = F.gelu(torch.baddbmm(self.hidden_bias, x, self.hidden_weight))
        bottleneck = torch.baddbmm(self.bottleneck_bias, hidden, self.bottleneck_weight)
        clusters = _UnitRows.apply(self.cluster_direction) * self.cluster_gain
        return torch.bmm(_UnitRows.apply(_at_least_float32(bottleneck)), clusters.transpose(1, 2))

    def part(self, heads: slice) -> "TemiHeads":
        """Return some of the heads as a module whose parameters and gradients are views of these."""
        part = TemiHeads.__new__(TemiHeads)
        nn.Module.__init__(part)
        for name, parameter in self.named_parameters():
            view = nn.Parameter(parameter.detach()[heads], requires_grad=parameter.requires_grad)
            view.grad = None if parameter.grad is None else parameter.grad[heads]
            setattr(part, name, view)
        return part

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Return the weight matrices, which AdamW decays."""
        return [self.hidden_weight, self.bottleneck_weight, self.cluster_direction]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return the biases and gains, which AdamW does not decay."""
        return [self.hidden_bias, self.bottleneck_bias, self.cluster_gain]


def cluster_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of the cluster probabilities, float32 or wider for logits of any precision; same shape."""
    return F.log_softmax(_at_least_float32(logits) / temperature, dim=-1)


@torch.no_grad()
def pair_weights(teacher_log_probs: Tensor) -> Tensor:
    """Return how far the teachers agree that a sample and its neighbour share a cluster: (b,), from (H, 2, b, C)."""
    teacher_probs = teacher_log_probs.exp()
    return (teacher_probs[:, 0] * teacher_probs[:, 1]).sum(dim=-1).mean(dim=0)


def temi_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, marginal: Tensor, pair_weight: Tensor, beta: float
) -> Tensor:
    """Return the loss of each head, (H,), for a batch of pairs (TEMI, equation 8; ELFS, section 3).

    `student_log_probs` and `teacher_log_probs` are (H, 2, b, C): axis 1 holds the samples, then their neighbours.
    `marginal` is (H, C), `pair_weight` what `pair_weights` says of all heads, (b,). No gradient flows into these two or
    the teacher.
    The sum over clusters is taken on logarithms, as (q_s·q_t)^β underflows where a head is certain.
    """
    with torch.no_grad():
        log_marginal = marginal.clamp_min(torch.finfo(marginal.dtype).tiny).log()
        target = beta * teacher_log_probs.flip(1) - log_marginal[:, None, None, :]
    agreement = torch.logsumexp(beta * student_log_probs + target, dim=-1)
    return -(pair_weight * agreement).mean(dim=(1, 2))


class _UnitRows(torch.autograd.Function):
    """L2 normalisation of the last axis; a gradient in two passes over memory, where F.normalize's takes eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(unit, gradient).unsqueeze(-1)
        return torch.addcmul(gradient, unit, along, value=-1).div_(norm)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
