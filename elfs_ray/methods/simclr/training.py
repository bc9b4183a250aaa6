"""Train an encoder by SimCLR: the settings, one step, and the state between epochs.

A step over several GPUs has the same loss and gradient as one GPU's on the same global batch: projections are gathered
with their gradients, and batch norms use the statistics of all workers. torch's SyncBatchNorm works between GPUs only,
so on CPUs there is one worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.numeric.precision import AUTOCAST_DTYPES, Precision
from elfs_ray.methods.simclr.loss import ContrastiveNetwork, nt_xent
from elfs_ray.methods.simclr.views import NUM_VIEWS, ViewSettings
from elfs_ray.methods.training.sgd import (
    cosine_lr,
    data_parallel,
    make_grad_scaler,
    make_optimizer,
    set_learning_rate,
    update,
)

LR_BATCH_SIZE = 256  # the batch that `SimclrSettings.lr` is for; the rate scales in proportion
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which suit most photographs
_INIT_STREAM = 0x73696D63


@dataclass(frozen=True)
class SimclrSettings:
    """Hyperparameters of SimCLR.

    The defaults are those of lightly's published runs of ResNet-18 on CIFAR-10, whose 200-NN accuracy was 82.8% after
    200 epochs and 87.5% after 800, plus a warm-up and Nesterov momentum.
    """

    network: str = "resnet18"
    epochs: int = 400
    batch_size: int = 512
    lr: float = 0.12
    warmup_epochs: int = 10
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 0.5
    hidden_dim: int = 512
    projection_dim: int = 128
    views: ViewSettings = field(default_factory=ViewSettings)


# What differs from the defaults where there are two cores and half an hour: few steps, so a higher learning rate, and
# a lower temperature, which weights the hardest negatives most.
CPU_PROFILE: dict[str, Any] = {
    "network": "small_cnn",
    "epochs": 16,
    "batch_size": 256,
    "lr": 0.3,
    "warmup_epochs": 1,
    "temperature": 0.2,
    "min_crop_area": 0.2,
}
LARGEST_SHARP_SIZE = 64  # pixels; images up to this size have no detail to spare for blurred views


def simclr_settings(keys: Mapping[str, Any], image_size: int) -> SimclrSettings:
    """Return the hyperparameters for views of `image_size` pixels: a key's value, else the profile's, else the default.

    keys: those of both dataclasses, None where unset, and profile; others are ignored. A warm-up that is not set takes
    at most a tenth of the epochs, or one epoch of a few.
    """
    preferred = {"blur_probability": 0.0 if image_size <= LARGEST_SHARP_SIZE else 0.5}
    preferred |= CPU_PROFILE if keys["profile"] == "cpu" else {}
    preferred |= {name: value for name, value in keys.items() if value is not None}

    def of(settings: type) -> dict[str, Any]:
        return {spec.name: preferred[spec.name] for spec in fields(settings) if spec.name in preferred}

    chosen = SimclrSettings(**of(SimclrSettings), views=ViewSettings(**of(ViewSettings)))
    if keys.get("warmup_epochs") is not None:
        return chosen
    epochs = chosen.epochs
    return replace(chosen, warmup_epochs=min(chosen.warmup_epochs, max(1, epochs // 10), max(0, epochs - 1)))


def even_batch(num_samples: int, batch_size: int) -> int:
    """Return the global batch, at most `batch_size`, whose last batch in an epoch of `num_samples` is fullest."""
    # The contrastive loss depends on the number of negatives: a small last batch would be a step of another kind.
    return -(-num_samples // -(-num_samples // batch_size))


class SimclrTrainer:
    """One worker's network and optimizer. The weights at the start are a function of the seed.

    num_steps: steps per epoch. group: the GPU workers that share every batch, None for a single worker. compiles:
    whether to use torch.compile, for a single worker only.
    """

    def __init__(
        self,
        settings: SimclrSettings,
        num_steps: int,
        seed: int,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        group: distributed.ProcessGroup | None = None,
        compiles: bool = False,
    ) -> None:
        self.settings, self.device, self.precision, self.group = settings, device, precision, group
        self._num_steps = num_steps
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
            torch.manual_seed(int(hash_uint64(seed, _INIT_STREAM)) >> 1)  # torch's seeds are int64: drop the top bit
            model = ContrastiveNetwork(settings.network, settings.hidden_dim, settings.projection_dim)
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: nn.Module = self.model
        if group is not None:
            # Otherwise each worker would normalize by its own statistics, and two would not have the loss of one.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model, group)
        if compiles:
            assert group is None, "each worker would compile kernels that round the shared statistics differently"
            self.model.compile(dynamic=False)  # the last batch of an epoch is the one other shape
        if group is not None:
            self.network = data_parallel(self.model, group)
        self._base_lr = settings.lr * settings.batch_size / LR_BATCH_SIZE
        self._optimizer = make_optimizer(
            self.model, lr=self._base_lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self._scaler = make_grad_scaler(precision, device)

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""
        return self.model.dim

    def learning_rate(self, epoch: int, step: int) -> float:
        """Return the rate of a step: linear warm-up, then half a cosine to 0, over the steps of all epochs."""
        total = self.settings.epochs * self._num_steps
        warmup = min(self.settings.warmup_epochs * self._num_steps, total - 1)
        return cosine_lr(epoch * self._num_steps + step, total, self._base_lr, 0.0, warmup)

    def step(
        self, views: torch.Tensor, shares: list[int], *, epoch: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Take one step on this worker's views (2·m, 3, s, s) float32, all first views before all second ones.

        shares: the number of images m of every worker. Returns features (2·m, d) and this worker's part of the loss,
        whose mean over workers is the loss, both detached, and the learning rate.
        """
        lr = self.learning_rate(epoch, step)
        set_learning_rate(self._optimizer, lr)
        dtype = AUTOCAST_DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            features, projections = self.network(views)
        # Both views go through the network in one batch, so that batch norm's statistics are those of both.
        by_view = projections.view(NUM_VIEWS, len(projections) // NUM_VIEWS, projections.shape[1])
        loss = nt_xent(by_view, self.settings.temperature, shares=shares, group=self.group)
        self._scaler.scale(loss).backward()
        update(self._optimizer, self._scaler)
        return features.detach(), loss.detach(), lr

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


def shares_of(num_real: int, world_size: int) -> list[int]:
    """Return how many real rows of a global batch each worker has, as `dynamics.BatchPlan` deals them out."""
    bounds = [num_real * rank // world_size for rank in range(world_size + 1)]
    return np.diff(bounds).tolist()
