"""SimCLR: an encoder learns, without labels, to tell the views of an image from the views of all others.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020, arXiv 2002.05709).
Among SimCLR, BYOL, MoCo v3 and DINO it was chosen because

- one network and one plain formula are all there is: no second network, queue, centring or schedule of momenta whose
  state could part from the weights', so that a resumed run is easily the same and every number can be checked;
- it repels images from each other in so many words: it hardly collapses, where BYOL and DINO need tricks not to;
- small images and batches of 256 to 512 suit it, as pools of a few thousand images and two CPU cores do. Its known
  weakness, the need for large batches, is one of ImageNet; here the batch of all workers counts as one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional

from elfs_ray.methods.training.networks import build_backbone

MIN_SPREAD = 0.02
MIN_EFFECTIVE_RANK = 1.5


class EncoderCollapseError(ValueError):
    """The encoder gives all images nearly the same embedding."""


class ContrastiveNetwork(nn.Module):
    """A backbone and the projector whose output the loss compares; the features before it are the embeddings.

    Weights come from torch's global generator.
    """

    def __init__(self, network: str, hidden_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.backbone, self.dim = build_backbone(network)
        self.projector = nn.Sequential(
            nn.Linear(self.dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, projection_dim),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (b, 3, s, s) float32 to features (b, d) and projections (b, p)."""
        features = self.backbone(images)
        return features, self.projector(features)


def nt_xent(
    projections: torch.Tensor, temperature: float, *, shares: list[int], group: distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """Return one worker's part of the loss of a global batch of N images; the workers' mean is that loss (equation 1).

        loss = 1 / 2N · Σ_i −log( exp(s_{i,j(i)} / T) / Σ_{k ≠ i} exp(s_{i,k} / T) )

    over all 2N views i, with j(i) the other view of the same image and s the cosine similarity. projections
    (2, m, p): both views of this worker's m images, of any float type; m may be 0. shares: the images of every worker,
    N together. Gradients reach every worker's views. Memory: 8 m·N floats. Returns a scalar float32.
    """
    with torch.autocast(projections.device.type, enabled=False):
        projected = functional.normalize(projections.float(), dim=2)
        all_projected = _gather(projected, shares, group)  # (2, N, p)
        rank = 0 if group is None else group.rank()
        num_images, total = projected.shape[1], sum(shares)
        assert num_images == shares[rank], (num_images, shares, rank)
        first = sum(shares[:rank])
        columns = torch.arange(first, first + num_images, device=projected.device)
        itself, other = torch.cat([columns, columns + total]), torch.cat([columns + total, columns])
        logits = projected.flatten(0, 1) @ all_projected.flatten(0, 1).T / temperature
        logits = logits.scatter(1, itself[:, None], -math.inf)
        losses = functional.cross_entropy(logits, other, reduction="sum")
        return losses * (len(shares) / (2 * total))


def _gather(projected: torch.Tensor, shares: list[int], group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Gather (2, m, p) of every worker as (2, N, p), by rank."""
    if group is None:
        return projected
    most = max(shares)
    padded = functional.pad(projected, (0, 0, 0, most - projected.shape[1]))
    all_projected = _GatherWithGradient.apply(padded, group)
    return torch.cat([rows[:, :share] for rows, share in zip(all_projected, shares, strict=True)], dim=1)


class _GatherWithGradient(torch.autograd.Function):
    """Equal tensors of all workers, stacked; the gradient of a worker's is the sum of what all workers' losses give."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = [torch.empty_like(projected) for _ in range(group.size())]
        distributed.all_gather(gathered, projected.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous()
        distributed.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


@dataclass(frozen=True)
class CollapseMeasures:
    """What embeddings of unit length spread over, without labels.

    spread: the mean standard deviation of a dimension times √d: 1 for directions of every kind, 0 for a single one.
    effective_rank: exp of the entropy of the covariance's eigenvalues as shares of their sum (Roy and Vetterli, 2007):
    the number of dimensions that are used, d at most.
    """

    spread: float
    effective_rank: float


class CollapseMonitor:
    """Sums up embeddings for their measures. Memory: d² doubles on the device.

    With a group, what all workers saw counts.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._sums = torch.zeros(dim + 1, dim, dtype=torch.float64, device=device)  # the last row: of the vectors
        self._count = 0

    @torch.no_grad()
    def add(self, features: torch.Tensor) -> None:
        """Take features (b, d) of any length; b may be 0."""
        rows = functional.normalize(features.float(), dim=1).double()
        self._sums[:-1].addmm_(rows.T, rows)
        self._sums[-1] += rows.sum(0)
        self._count += len(rows)

    def finish(self, group: distributed.ProcessGroup | None = None) -> CollapseMeasures:
        """Return the measures of all that was added since the last call."""
        sums = torch.cat([self._sums.flatten(), self._sums.new_tensor([self._count])])
        if group is not None:
            distributed.all_reduce(sums, group=group)
        self._sums.zero_()
        self._count = 0
        moments = sums[:-1].view(self._sums.shape).cpu() / sums[-1].cpu()
        mean = moments[-1]
        covariance = moments[:-1] - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp(min=0).sqrt().mean().item() * math.sqrt(len(mean))
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
        if eigenvalues.sum() < 1e-12:
            return CollapseMeasures(spread, 1.0)
        shares = eigenvalues / eigenvalues.sum()
        return CollapseMeasures(spread, math.exp(torch.special.entr(shares).sum().item()))


def check_encoder_collapse(measures: CollapseMeasures, epoch: int) -> None:
    """Raise EncoderCollapseError where embeddings have become one point or one line."""
    if measures.spread >= MIN_SPREAD and measures.effective_rank >= MIN_EFFECTIVE_RANK:
        return
    raise EncoderCollapseError(
        f"the encoder has collapsed in epoch {epoch}: its embeddings have spread {measures.spread:.4f} (a "
        f"healthy one is {MIN_SPREAD:g} or more) and effective rank {measures.effective_rank:.2f} "
        f"({MIN_EFFECTIVE_RANK:g} or more), so all images look alike to it. Lower "
        "pretrain.lr or pretrain.weight_decay, raise pretrain.warmup_epochs, and see that the pool's images differ"
    )
