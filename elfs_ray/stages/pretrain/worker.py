"""What a pretraining worker does: the epochs and their metrics, checkpoints on the way, the encoder at the end."""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from torch import distributed

from elfs_ray.methods.encoders.weights import TrainedEncoder
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.simclr.loss import CollapseMonitor, check_collapse
from elfs_ray.methods.simclr.training import MEAN, STD, SimclrSettings, SimclrTrainer, even_batch, shares_of
from elfs_ray.methods.simclr.views import NUM_VIEWS, ViewSettings, change_colors, two_crops
from elfs_ray.methods.training.dynamics import BatchPlan
from elfs_ray.methods.training.sgd import LossMonitor
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR, load_checkpoint
from elfs_ray.stages.training.epoch_log import EpochLog
from elfs_ray.stages.training.reader import Batch
from elfs_ray.stages.training.streamed_reader import make_reader
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import TABLES, RunDir

MEASURED_STEPS = 16  # the last of an epoch, whose embeddings tell of a collapse


@dataclass(frozen=True)
class PretrainJob:
    """What every worker is given; `data` is what `load_data` left in the object store."""

    settings: SimclrSettings
    precision: str
    compile: bool
    seed: int
    image_size: int
    proxy_size: int
    run_dir: RunDir
    data: list[Any]
    board: Any
    num_decoders: int


@dataclass(frozen=True)
class TwoViews:
    """The augmentation of pretraining: two crops of every image, each in other colours."""

    settings: ViewSettings
    seed: int
    size: int

    @property
    def takes_whole_images(self) -> bool:
        return True

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """(n, h, w, 3) uint8 to (n, 2, size, size, 3) uint8."""
        return two_crops(images, sample_ids, self.settings, seed=self.seed, epoch=epoch, size=self.size)

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """(n, 2, s, s, 3) uint8 to (2·n, 3, s, s) float32, all first views before all second ones."""
        views = [
            change_colors(crops[:, view], sample_ids, self.settings, MEAN, STD, seed=self.seed, epoch=epoch, view=view)
            for view in range(NUM_VIEWS)
        ]
        return torch.cat(views)


def pretrain_worker(job: PretrainJob) -> None:
    """One worker of the group: every epoch that is left."""
    PretrainWorker(job).train()


class PretrainWorker:
    """One worker's pretraining: its reader and trainer, and the epoch to go on with. Made within Ray Train."""

    def __init__(self, job: PretrainJob):
        self.job, self.settings = job, job.settings
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.group = distributed.group.WORLD if self.world_size > 1 else None
        pool, images = ray.get(job.data)
        num_samples = len(pool.sample_ids)
        batch_size = even_batch(num_samples, self.settings.batch_size)
        self.plan = BatchPlan(num_samples, batch_size, self.rank, self.world_size)
        self.reader = make_reader(
            pool,
            images,
            TwoViews(self.settings.views, job.seed, job.image_size),
            self.plan,
            self.device,
            proxy_size=job.proxy_size,
            num_decoders=job.num_decoders,
        )
        self.trainer = SimclrTrainer(
            dataclasses.replace(self.settings, batch_size=batch_size),
            self.plan.num_steps,
            job.seed,
            device=self.device,
            precision=resolve_precision(job.precision, self.device),
            group=self.group,
            compiles=job.compile,
        )
        self.losses, self.collapse = LossMonitor(), CollapseMonitor(self.trainer.dim, self.device)
        self.log = EpochLog("pretrain", job.run_dir, job.board, num_samples, self.rank, self.world_size, self.device)
        self.first_epoch = self._load_checkpoint()

    def train(self) -> None:
        """Every epoch that is left; then rank 0 writes the encoder."""
        for epoch in range(self.first_epoch, self.settings.epochs):
            metrics = self.train_epoch(epoch)
            self.log.end_epoch(
                *(epoch, metrics, _note(metrics, self.settings.epochs), self._state),
                num_epochs=self.settings.epochs,
                is_last=epoch == self.settings.epochs - 1,
            )
        if self.rank == 0:
            filesystem.write_bytes(self.job.run_dir.path("pretrain", schema.ENCODER_FILE), self._encoder().to_bytes())

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the pool; its metrics. Raises CollapseError, on every worker."""
        start_s, waiting_s = time.perf_counter(), 0.0
        steps = self.reader.steps(epoch)
        for index in range(self.plan.num_steps):
            asked_s = time.perf_counter()
            num_real, (batch,) = next(steps)
            waiting_s += time.perf_counter() - asked_s
            features, loss, lr = self.trainer.step(
                real_views(batch), shares_of(num_real, self.world_size), epoch=epoch, step=index
            )
            self.losses.add(loss, num_real=num_real, epoch=epoch, step=index, lr=lr)
            if index >= self.plan.num_steps - MEASURED_STEPS:
                self.collapse.add(features)
            self.log.end_step(epoch, (index + 1) * self.plan.global_batch)
        mean_loss = self.losses.finish()  # before measures of embeddings that a NaN could have reached
        measures = self.collapse.finish(self.group)
        check_collapse(measures, epoch)
        loss_mean, waiting = self._mean_over_workers(mean_loss, waiting_s)
        seconds = time.perf_counter() - start_s
        return {
            "epoch": epoch,
            "loss": loss_mean,
            "spread": measures.spread,
            "effective_rank": measures.effective_rank,
            "lr": lr,
            "seconds": seconds,
            "images_per_s": self.plan.num_samples / seconds,
            "data_wait_share": waiting / seconds,
            "workers": self.world_size,
        }

    def _mean_over_workers(self, *values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.group is not None:
            distributed.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def _state(self, next_epoch: int) -> dict[str, Any]:
        """A checkpoint to go on from."""
        return {"next_epoch": next_epoch, **self.trainer.state_dict()}

    def _load_checkpoint(self) -> int:
        """Restore the last reported state, if there is one; the epoch to go on with."""
        state = load_checkpoint(self.job.run_dir.path("pretrain", CHECKPOINTS_DIR))
        if state is None:
            return 0
        self.trainer.load_state_dict(state)
        return int(state["next_epoch"])

    def _encoder(self) -> TrainedEncoder:
        """The backbone, with what made it."""
        weights = self.trainer.model.backbone.state_dict()
        return TrainedEncoder(
            network=self.settings.network,
            image_size=self.job.image_size,
            mean=MEAN,
            std=STD,
            config={
                "seed": self.job.seed,
                "precision": self.trainer.precision,
                "compile": self.job.compile,
                "workers": self.world_size,
                "device": self.device.type,
                "torch": str(torch.__version__),
                **dataclasses.asdict(self.settings),
            },
            pool=pool_hash(self.job.run_dir),
            state_dict={name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        )


def pool_hash(run_dir: RunDir) -> str:
    """A hash (16 hex digits) of how the pool was listed and copied, and of how many files and bytes that gave."""
    found = {stage: [run_dir.identity(stage), run_dir.figures(stage).get(TABLES)] for stage in ("index", "copy")}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def real_views(batch: Batch) -> torch.Tensor:
    """The views of a batch without those rows that only fill it: they are no image's negatives, nor in statistics."""
    if batch.mask.all():
        return batch.inputs
    real = torch.from_numpy(np.flatnonzero(np.tile(batch.mask, NUM_VIEWS))).to(batch.inputs.device)
    return batch.inputs.index_select(0, real).contiguous(memory_format=torch.channels_last)


def _note(metrics: dict[str, float], num_epochs: int) -> str:
    return (
        f"epoch {metrics['epoch'] + 1}/{num_epochs}, loss {metrics['loss']:.3f}, spread {metrics['spread']:.3f}, "
        f"effective rank {metrics['effective_rank']:.1f}, {metrics['images_per_s']:,.0f} images/s, "
        f"{metrics['data_wait_share']:.0%} waiting for data"
    )
