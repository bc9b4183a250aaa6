"""The loss of TEMI (Adaloglou et al., BMVC 2023, arXiv 2303.17896): agreement of student and teacher on neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elfs_ray.methods.temi.heads import at_least_float32


def cluster_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Return the log of the cluster probabilities, of the logits' shape, in float32 or wider."""
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)


@torch.no_grad()
def pair_weights(teacher_log_probs: Tensor) -> Tensor:
    """Return the weight (b,) of each pair, from teacher log-probabilities (H, 2, b, C).

    It is the probability, averaged over the heads, that the teachers put a sample and its neighbour into one cluster.
    """
    teacher_probs = teacher_log_probs.exp()
    return (teacher_probs[:, 0] * teacher_probs[:, 1]).sum(dim=-1).mean(dim=0)


def temi_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, marginal: Tensor, pair_weight: Tensor, beta: float
) -> Tensor:
    """Return the loss of each head, (H,), for a batch of pairs (TEMI, equation 8; ELFS, section 3).

    `student_log_probs` and `teacher_log_probs` are (H, 2, b, C): axis 1 holds the samples, then their neighbours.
    `marginal` is (H, C), `pair_weight` (b,) the `pair_weights` over all heads. Gradients flow into the student alone.
    """
    with torch.no_grad():
        # The marginal of an unused cluster decays to 0, whose logarithm would make the loss infinite.
        log_marginal = marginal.clamp_min(torch.finfo(marginal.dtype).tiny).log()
        target = beta * teacher_log_probs.flip(1) - log_marginal[:, None, None, :]
    # The sum over clusters is taken on logarithms, as (q_s · q_t)^β underflows where a head is certain.
    agreement = torch.logsumexp(beta * student_log_probs + target, dim=-1)
    return -(pair_weight * agreement).mean(dim=(1, 2))
