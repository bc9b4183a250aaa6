"""Pretrain in one worker: epochs, metrics, checkpoints and, at the end, the encoder's file."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from elfs_ray.methods.encoders.weights import TrainedEncoder
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.simclr.loss import CollapseMonitor, check_encoder_collapse
from elfs_ray.methods.simclr.training import MEAN, STD, SimclrSettings, SimclrTrainer, even_batch, shares_of
from elfs_ray.methods.simclr.views import NUM_VIEWS, ViewSettings, change_colors, two_crops
from elfs_ray.methods.training.dynamics import BatchPlan
from elfs_ray.methods.training.sgd import LossMonitor
from elfs_ray.runtime.tasks import get_result
from elfs_ray.stages.pretrain import STAGE
from elfs_ray.stages.training.epoch_log import EpochLog
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.reader import Batch
from elfs_ray.stages.training.step_clock import StepClock
from elfs_ray.stages.training.streamed_reader import make_reader
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MEASURED_STEPS = 16  # the last steps of an epoch, whose features are checked for a collapse


@dataclass(frozen=True)
class PretrainJob:
    """The inputs of every worker of pretraining; `data` holds the references that `load_data` returns."""

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
    """The augmentation of pretraining: two crops of every image, each with its own change of colours."""

    settings: ViewSettings
    seed: int
    size: int

    @property
    def takes_whole_images(self) -> bool:
        return True

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Crop (n, h, w, 3) uint8 to (n, 2, size, size, 3) uint8."""
        return two_crops(images, sample_ids, self.settings, seed=self.seed, epoch=epoch, size=self.size)

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Change the colours of (n, 2, s, s, 3) uint8; return (2·n, 3, s, s) float32, all first views first."""
        views = [
            change_colors(crops[:, view], sample_ids, self.settings, MEAN, STD, seed=self.seed, epoch=epoch, view=view)
            for view in range(NUM_VIEWS)
        ]
        return torch.cat(views)


def pretrain_worker(job: PretrainJob) -> None:
    """Train the epochs that are left, as one worker of the group."""
    PretrainWorker(job).train()


class PretrainWorker:
    """One worker's reader and trainer. Must be made in a worker of Ray Train."""

    def __init__(self, job: PretrainJob):
        self.job, self.settings, self.member = job, job.settings, GroupMember.current()
        member = self.member
        pool, images = map(get_result, job.data)
        num_samples = len(pool.sample_ids)
        batch_size = even_batch(num_samples, self.settings.batch_size)
        self.plan = BatchPlan(num_samples, batch_size, member.rank, member.world_size)
        self.reader = make_reader(
            pool,
            images,
            TwoViews(self.settings.views, job.seed, job.image_size),
            self.plan,
            member.device,
            proxy_size=job.proxy_size,
            num_decoders=job.num_decoders,
        )
        self.trainer = SimclrTrainer(
            dataclasses.replace(self.settings, batch_size=batch_size),
            self.plan.num_steps,
            job.seed,
            device=member.device,
            precision=resolve_precision(job.precision, member.device),
            group=member.process_group,
            compiles=job.compile,
        )
        self.losses, self.collapse = LossMonitor(), CollapseMonitor(self.trainer.dim, member.device)
        self.earlier_s = 0.0  # of the epoch, before a resume within it
        self.log = EpochLog(
            STAGE, job.run_dir, job.board, member, num_samples=num_samples, num_epochs=self.settings.epochs
        )

    def train(self) -> None:
        """Train the epochs that are left; then rank 0 writes the encoder."""
        for epoch, first_step in self.log.epochs_left(self._load_state_dict):
            metrics = self.train_epoch(epoch, first_step)
            note = f"spread {metrics['spread']:.3f}, effective rank {metrics['effective_rank']:.1f}"
            self.log.end_epoch(metrics, note, self.trainer.state_dict)
        if self.member.rank == 0:
            filesystem.write_bytes(self.job.run_dir.path("pretrain", schema.ENCODER_FILE), self._encoder().to_bytes())

    def train_epoch(self, epoch: int, first_step: int = 0) -> dict[str, float]:
        """Train one epoch. Returns its metrics, over all workers.

        first_step: the step to begin with, if the checkpoint was saved within the epoch. Raises EncoderCollapseError,
        and LeftOnNotice if the group has to leave.
        """
        clock, world_size = StepClock(self.member.device, self.earlier_s), self.member.world_size
        self.earlier_s = 0.0
        steps = self.reader.steps(epoch, first_step)
        for index in range(first_step, self.plan.num_steps):
            num_real, (batch,) = clock.next_step(steps)
            features, loss, lr = self.trainer.step(
                real_views(batch), shares_of(num_real, world_size), epoch=epoch, step=index
            )
            self.losses.add(loss, num_real=num_real, epoch=epoch, step=index, lr=lr)
            if index >= self.plan.num_steps - MEASURED_STEPS:
                self.collapse.add(features)
            self.log.end_step(epoch, (index + 1) * self.plan.global_batch)
            if self.log.must_leave() and index + 1 < self.plan.num_steps:
                self._leave(epoch, index + 1, clock)
        # The loss first: it raises for a NaN, which would otherwise reach the measures and look like a collapse.
        mean_loss = self.losses.finish()
        measures = self.collapse.finish(self.member.process_group)
        check_encoder_collapse(measures, epoch)
        times = clock.finish()
        loss_sum, waiting = self.member.sum_over_workers(mean_loss, times["data_wait_share"])
        return {
            "epoch": epoch,
            "loss": loss_sum / world_size,
            "spread": measures.spread,
            "effective_rank": measures.effective_rank,
            "lr": lr,
            "seconds": times["seconds"],
            "images_per_s": self.plan.num_samples / times["seconds"],
            "data_wait_share": waiting / world_size,
            "workers": world_size,
        }

    def _leave(self, epoch: int, next_step: int, clock: StepClock) -> NoReturn:
        """Save all that the rest of the epoch needs, and raise LeftOnNotice."""
        loss_sum, num_real = self.losses.state()
        mean_loss_sum = self.member.sum_over_workers(loss_sum)[0] / self.member.world_size
        within = {
            "losses": (mean_loss_sum, num_real),
            "collapse": self.collapse.state(self.member.process_group),
            "seconds": clock.seconds,
        }
        self.log.leave(epoch, next_step, lambda: {**self.trainer.state_dict(), **within})

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the content of a checkpoint."""
        self.trainer.load_state_dict(state)
        if "losses" not in state:
            return
        # It was saved within an epoch (`_leave`).
        self.losses.load_state(*state["losses"])
        self.earlier_s = state["seconds"]
        if self.member.rank == 0:
            self.collapse.load_state(state["collapse"])

    def _encoder(self) -> TrainedEncoder:
        """Return the backbone with the settings that it was trained with."""
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
                "workers": self.member.world_size,
                "device": self.member.device.type,
                "torch": str(torch.__version__),
                **dataclasses.asdict(self.settings),
            },
            pool=pool_hash(self.job.run_dir),
            state_dict={name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        )


def pool_hash(run_dir: RunDir) -> str:
    """Return a hash that identifies the pool, 16 hex digits.

    It covers the configs of stages index and copy and the files and bytes that they wrote.
    """
    markers = [run_dir.complete_marker(stage) for stage in ("index", "copy")]
    content = {marker.stage: [marker.identity, marker.outputs] for marker in markers}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def real_views(batch: Batch) -> torch.Tensor:
    """Return the views of a batch without its padding."""
    # A duplicate would be its original's negative, and would count twice in the statistics of batch norms.
    if batch.mask.all():
        return batch.inputs
    real = torch.from_numpy(np.flatnonzero(np.tile(batch.mask, NUM_VIEWS))).to(batch.inputs.device)
    return batch.inputs.index_select(0, real).contiguous(memory_format=torch.channels_last)
