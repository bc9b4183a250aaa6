"""SimCLR's network, loss and collapse check: an encoder learns to tell views of one image from views of all others.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020, arXiv 2002.05709).
Among SimCLR, BYOL, MoCo v3 and DINO it was chosen because

- it has one network and one formula: no second network, queue, centering or momentum schedule whose state could differ
  from the weights' after a resume, and every number can be checked;
- its loss repels images from each other, so it rarely collapses, which BYOL and DINO need tricks to avoid;
- it suits small images and batches of 256 to 512, as in pools of a few thousand images on two CPU cores. Its known
  weakness, the need for large batches, shows on ImageNet; here the batches of all workers count as one.
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
    """Raised for an encoder that gives all images nearly the same embedding."""


class ContrastiveNetwork(nn.Module):
    """A backbone and a projector. The loss compares the projector's output; the backbone's features are the embeddings.

    The features before the projector transfer better than those after it (section 4.2 of the paper). The weights are
    initialized from torch's global generator.
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

    over all 2N views i, with j(i) the other view of the same image and s the cosine similarity. projections (2, m, p):
    both views of this worker's m images, of any float type; m may be 0. shares: the number of images of every worker,
    N in total. Gradients reach every worker's views. Memory: 8 m·N floats. Returns a scalar float32.
    """
    # In half precision the similarities over a small temperature would lose the differences that the loss is about.
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
        # A view is not its own negative. With that column at -inf, the formula is a cross-entropy with target j(i).
        logits = logits.scatter(1, itself[:, None], -math.inf)
        losses = functional.cross_entropy(logits, other, reduction="sum")
        # DDP averages gradients over workers, so the parts must average, not sum, to the mean over all 2N views.
        return losses * (len(shares) / (2 * total))


def _gather(projected: torch.Tensor, shares: list[int], group: distributed.ProcessGroup | None) -> torch.Tensor:
    """Gather the (2, m, p) of all workers into (2, N, p), by rank."""
    if group is None:
        return projected
    most = max(shares)  # all_gather takes tensors of equal shapes alone: pad, gather, cut
    padded = functional.pad(projected, (0, 0, 0, most - projected.shape[1]))
    all_projected = _GatherWithGradient.apply(padded, group)
    return torch.cat([rows[:, :share] for rows, share in zip(all_projected, shares, strict=True)], dim=1)


class _GatherWithGradient(torch.autograd.Function):
    """An all_gather with a gradient: that of a worker's tensor is the sum over the losses of all workers.

    torch's own all_gather lets no gradient through, but every worker's loss depends on every worker's views.
    """

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
    """Label-free metrics of how widely embeddings of unit length are spread.

    spread: the mean standard deviation of a dimension times √d: 1 for uniform directions, 0 for a single one.
    effective_rank: exp of the entropy of the covariance's normalized eigenvalues (Roy and Vetterli 2007): the number of
    dimensions in use, d at most.
    """

    spread: float
    effective_rank: float


class CollapseMonitor:
    """Running sums of embeddings from which `CollapseMeasures` follow. Memory: d² doubles on the device."""

    def __init__(self, dim: int, device: torch.device) -> None:
        # Second moments, and in the last row the sum of the vectors. float64, as the covariance of a collapsed encoder
        # is a tiny difference of the two.
        self._sums = torch.zeros(dim + 1, dim, dtype=torch.float64, device=device)
        self._count = 0

    @torch.no_grad()
    def add(self, features: torch.Tensor) -> None:
        """Add features (b, d), which are scaled to unit length; b may be 0."""
        rows = functional.normalize(features.float(), dim=1).double()
        self._sums[:-1].addmm_(rows.T, rows)
        self._sums[-1] += rows.sum(0)
        self._count += len(rows)

    def state(self, group: distributed.ProcessGroup | None = None) -> torch.Tensor:
        """Return the sums of all workers of the group since `finish` as one vector, on every worker."""
        sums = torch.cat([self._sums.flatten(), self._sums.new_tensor([self._count])])
        if group is not None:
            distributed.all_reduce(sums, group=group)
        return sums

    def load_state(self, sums: torch.Tensor) -> None:
        """Go on from the sums of `state`; one worker of a group must do so, the others begin with none."""
        self._sums.copy_(sums[:-1].view(self._sums.shape))
        self._count = int(sums[-1])

    def finish(self, group: distributed.ProcessGroup | None = None) -> CollapseMeasures:
        """Return the measures of all features that were added since the last call, on every worker of the group."""
        sums = self.state(group)
        self._sums.zero_()
        self._count = 0
        moments = sums[:-1].view(self._sums.shape).cpu() / sums[-1].cpu()
        mean = moments[-1]
        covariance = moments[:-1] - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp(min=0).sqrt().mean().item() * math.sqrt(len(mean))
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
        if eigenvalues.sum() < 1e-12:  # a single point: normalized eigenvalues would be 0 / 0
            return CollapseMeasures(spread, 1.0)
        shares = eigenvalues / eigenvalues.sum()
        return CollapseMeasures(spread, math.exp(torch.special.entr(shares).sum().item()))


def check_encoder_collapse(measures: CollapseMeasures, epoch: int) -> None:
    """Raise EncoderCollapseError where embeddings have shrunk to a point or a line."""
    if measures.spread >= MIN_SPREAD and measures.effective_rank >= MIN_EFFECTIVE_RANK:
        return
    raise EncoderCollapseError(
        f"the encoder collapsed in epoch {epoch}: its embeddings have spread {measures.spread:.4f} (healthy: "
        f"{MIN_SPREAD:g} or more) and effective rank {measures.effective_rank:.2f} (healthy: {MIN_EFFECTIVE_RANK:g} or "
        "more), so all images look alike to it. Lower pretrain.lr or pretrain.weight_decay, raise "
        "pretrain.warmup_epochs, and check that the pool's images differ"
    )
