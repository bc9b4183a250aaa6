"""The clustering heads of TEMI and their settings (Adaloglou et al., BMVC 2023, arXiv 2303.17896).

TEMI clusters embeddings with many heads that train at the same time. Each head is a small student and teacher that
learn to put a sample and its neighbour into the same cluster. All heads form one batched module, so that a step takes a
few large matrix products, however many heads there are. loss.py has what they minimize, training.py the training.
"""

import dataclasses
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
    """Hyperparameters of TEMI. The defaults are the paper's; `CPU_PROFILE` holds what differs on a few CPU cores.

    `batch_size` is that of the global batch, and `learning_rate` is for a batch of 256 and scales in proportion. With
    `pca_dim` the caller projects the embeddings (`fit_pca`, `project`) before they reach the trainer.
    """

    num_clusters: int
    num_heads: int = 50
    hidden_dim: int = 512
    bottleneck_dim: int = 256
    num_epochs: int = 200
    num_warmup_epochs: float = 20
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
                f"num_clusters={self.num_clusters}, num_heads={self.num_heads}, batch_size={self.batch_size}; TEMI "
                "needs at least 2 clusters, 1 head and a batch of 1"
            )


# Students follow their teacher, and a teacher of momentum 0.996 moves over some 250 steps. The paper trains for 10,000
# steps, a CPU has time for a fraction of them. On MNIST a faster teacher was what brought the gain early; the learning
# rate mattered little.
CPU_PROFILE: dict[str, Any] = {
    "num_heads": 8,
    "num_epochs": 10,
    "num_warmup_epochs": 1,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "teacher_momentum": 0.9,
    "pca_dim": 128,
}


# Up to the size of ImageNet's training images, the published settings hold as they are.
MOST_AS_PUBLISHED = 1_281_167
MAX_BATCH_FACTOR = 8  # the most that was measured (benchmarks/temi.py --batches)


def batch_factor(num_samples: int) -> int:
    """Return how many times as large as published the batch of a pool is: it doubles as the pool does, from ImageNet's.

    A function of the pool alone, and not of the workers that happen to be there: these must not change the labels.
    """
    return 1 << (max(1, min(MAX_BATCH_FACTOR, num_samples // MOST_AS_PUBLISHED)).bit_length() - 1)


def cap_samples_seen(settings: TemiSettings, num_samples: int) -> TemiSettings:
    """Return settings with which a pool shows no more samples than ImageNet does, but each at least once.

    The warm-up is the same share of the steps, and may be a fraction of an epoch.
    """
    num_epochs = min(settings.num_epochs, -(-settings.num_epochs * MOST_AS_PUBLISHED // num_samples))
    num_warmup_epochs = settings.num_warmup_epochs * num_epochs / settings.num_epochs
    return dataclasses.replace(settings, num_epochs=num_epochs, num_warmup_epochs=num_warmup_epochs)


def enlarge_batch(settings: TemiSettings, factor: int) -> TemiSettings:
    """Return settings for a batch `factor` times as large, for training in as many times fewer steps.

    The learning rate grows in proportion, as `learning_rate` says. Teacher and marginal are moving averages over steps,
    which now move so much more in each that they reach back over as many samples as before.
    """
    return dataclasses.replace(
        settings,
        batch_size=settings.batch_size * factor,
        teacher_momentum=settings.teacher_momentum**factor,
        marginal_momentum=settings.marginal_momentum**factor,
    )


class TemiHeads(nn.Module):
    """H clustering heads as one batched module: Linear, GELU, Linear, L2 normalization, weight-normed Linear (no bias).

    The weights at the start are a function of the seed.
    """

    def __init__(self, input_dim: int, settings: TemiSettings, seed: int = 0):
        super().__init__()
        h, hidden, bottleneck = settings.num_heads, settings.hidden_dim, settings.bottleneck_dim
        # Its own generator leaves torch's global random state alone. Seeds are int64: drop the hash's top bit.
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
        # The paper feeds encoder outputs, whose coordinates are of order 1, and the initialization suits those: unit
        # vectors are scaled by √d. expand() shares one copy of the batch among all heads.
        x = (x * math.sqrt(x.shape[1])).expand(len(self.hidden_weight), -1, -1)
        hidden = F.gelu(torch.baddbmm(self.hidden_bias, x, self.hidden_weight))
        bottleneck = torch.baddbmm(self.bottleneck_bias, hidden, self.bottleneck_weight)
        clusters = _UnitRows.apply(self.cluster_direction) * self.cluster_gain
        # Norms are taken in float32: the squares of half-precision numbers underflow or lose too many bits.
        return torch.bmm(_UnitRows.apply(at_least_float32(bottleneck)), clusters.transpose(1, 2))

    def part(self, heads: slice) -> "TemiHeads":
        """Return some of the heads as a module whose parameters and gradients are views of this module's."""
        part = TemiHeads.__new__(TemiHeads)  # not __init__, which would initialize parameters of its own
        nn.Module.__init__(part)
        for name, parameter in self.named_parameters():
            view = nn.Parameter(parameter.detach()[heads], requires_grad=parameter.requires_grad)
            view.grad = None if parameter.grad is None else parameter.grad[heads]
            setattr(part, name, view)
        return part

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Return the weight matrices, to which weight decay applies."""
        return [self.hidden_weight, self.bottleneck_weight, self.cluster_direction]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return the biases and gains, to which weight decay does not apply."""
        return [self.hidden_bias, self.bottleneck_bias, self.cluster_gain]


class _UnitRows(torch.autograd.Function):
    """L2 normalization of the last axis, whose gradient takes two passes over memory instead of F.normalize's eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The gradient of x / ‖x‖ is the part of the incoming gradient orthogonal to the unit vector, over the norm.
        unit, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(unit, gradient).unsqueeze(-1)
        return torch.addcmul(gradient, unit, along, value=-1).div_(norm)


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision numbers as float32, others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
