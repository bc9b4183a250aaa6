"""Train the proxy network in one worker: epochs, records, metrics and checkpoints.

Memory besides the network and a batch: up to about 110 bytes for each sample of the worker's share, for an epoch's
order and records (106 measured with streamed images, benchmarks/train.py). Images in memory are shared by the workers
of a node (training/reader.py).
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch
from torch import distributed, nn

from elfs_ray.config import LINEAR, TrainConfig, scaled_lr
from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.training.dynamics import BatchPlan, DynamicsRecorder
from elfs_ray.methods.training.networks import build_linear_model, build_proxy_model
from elfs_ray.methods.training.sgd import (
    LossMonitor,
    cosine_lr,
    data_parallel,
    forward_backward,
    make_grad_scaler,
    make_optimizer,
    set_learning_rate,
    update,
)
from elfs_ray.runtime.tasks import get_result
from elfs_ray.stages.train import STAGE
from elfs_ray.stages.training.checkpoints import PARTS
from elfs_ray.stages.training.epoch_log import NEXT_STEP, EpochLog
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.reader import Augmenter, Batch, UnchangedEmbeddings
from elfs_ray.stages.training.step_clock import StepClock
from elfs_ray.stages.training.streamed_reader import make_reader
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

_INIT_STREAM = 0x696E6974  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class ProxyTrainingJob:
    """The inputs of every worker of proxy training.

    `data` holds two references to the object store: a TrainingPool, then decoded images (m, s, s, 3) uint8, the
    ChunkTable of streamed images, or the embeddings (m, d) float16 of a linear proxy.
    """

    config: TrainConfig
    seed: int
    num_classes: int
    proxy_size: int
    run_dir: RunDir
    data: list[Any]
    board: Any
    num_decoders: int

    @property
    def size(self) -> int:
        """Return the side of the square that the network sees."""
        return self.config.image_size or self.proxy_size


def train_proxy(job: ProxyTrainingJob) -> None:
    """Train the epochs that are left, as one worker of the group."""
    ProxyTrainingWorker(job).train()


def init_seed(seed: int) -> int:
    """Return the seed of torch's generator for the network's initial weights."""
    return int(hash_uint64(seed, _INIT_STREAM)) >> 1


class ProxyTrainingWorker:
    """One worker's reader, network, optimiser and recorder. Must be made in a worker of Ray Train."""

    def __init__(self, job: ProxyTrainingJob):
        self.job, self.config, self.member = job, job.config, GroupMember.current()
        config, member = self.config, self.member
        self.precision = resolve_precision(config.precision, member.device)
        pool, inputs = map(get_result, job.data)
        is_linear = config.network == LINEAR
        self.plan = BatchPlan(
            len(pool.sample_ids), config.batch_size, member.rank, member.world_size, config.micro_batch_size
        )
        self.reader = make_reader(
            pool,
            inputs,
            UnchangedEmbeddings(job.seed) if is_linear else Augmenter(config, job.seed, job.size),
            self.plan,
            member.device,
            proxy_size=job.proxy_size,
            num_decoders=job.num_decoders,
        )
        self.model = self._make_model(inputs.shape[1] if is_linear else None)
        self.network = data_parallel(self.model) if member.world_size > 1 else self.model
        self.optimizer = make_optimizer(
            self.model,
            lr=scaled_lr(config),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        self.scaler = make_grad_scaler(self.precision, member.device)
        self.recorder, self.losses = DynamicsRecorder(self.plan.num_rows, member.device), LossMonitor()
        self.earlier_s = 0.0  # of the epoch, before a resume within it
        self.log = EpochLog(
            STAGE, job.run_dir, job.board, member, num_samples=self.plan.num_samples, num_epochs=config.epochs
        )

    def _make_model(self, dim: int | None) -> nn.Module:
        """Return the network on images or, for embeddings of `dim` numbers, the linear classifier."""
        # The initial weights depend on the seed alone, not on what has used torch's generator before.
        torch.manual_seed(init_seed(self.job.seed))
        if dim is None:
            model = build_proxy_model(self.config.network, self.job.num_classes)
        else:
            model = build_linear_model(dim, self.job.num_classes)
        model = model.to(device=self.member.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.compile:
            model.compile()
        return model

    def train(self) -> None:
        """Train the epochs that are left."""
        for epoch, first_step in self.log.epochs_left(self.load_state_dict):
            metrics, records = self.train_epoch(epoch, first_step)
            # Before the checkpoint is reported: a group that resumes from it never trains this epoch again.
            self._write_records(epoch, records)
            self.log.end_epoch(metrics, f"accuracy {metrics['accuracy']:.1%}", self.state_dict)

    def train_epoch(self, epoch: int, first_step: int = 0) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Train one epoch. Returns its metrics, over all workers, and this worker's records.

        first_step: the step to begin with, if the checkpoint was saved within the epoch. Raises LeftOnNotice if the
        group has to leave.
        """
        clock, num_steps = StepClock(self.member.device, self.earlier_s), self.plan.num_steps
        self.earlier_s = 0.0
        steps = self.reader.steps(epoch, first_step)
        for index in range(first_step, num_steps):
            num_real, batches = clock.next_step(steps)
            lr = self._learning_rate(epoch * num_steps + index)
            set_learning_rate(self.optimizer, lr)
            loss = self._step(batches, num_real, clock)
            self.losses.add(loss, num_real=num_real, epoch=epoch, step=index, lr=lr)
            self.log.end_step(epoch, (index + 1) * self.config.batch_size)
            if self.log.must_leave() and index + 1 < num_steps:
                self._leave(epoch, index + 1, clock)
        records, mean_loss, times = self.recorder.finish(), self.losses.finish(), clock.finish()
        # A sample counts as right if its pseudo-label was the likeliest class in the pass that trained on it.
        num_right = int((records[schema.TARGET_PROB] > records[schema.MAX_OTHER_PROB]).sum())
        num_right_of_all, loss_sum, waiting, recording = self.member.sum_over_workers(
            num_right, mean_loss, times["data_wait_share"], times["recorder_share"]
        )
        metrics = {
            "epoch": epoch,
            "loss": loss_sum / self.member.world_size,
            "accuracy": num_right_of_all / self.plan.num_samples,
            "lr": lr,
            "seconds": times["seconds"],
            "images_per_s": self.plan.num_samples / times["seconds"],
            "data_wait_share": waiting / self.member.world_size,
            "recorder_share": recording / self.member.world_size,
            "workers": self.member.world_size,
        }
        return metrics, records

    def _leave(self, epoch: int, next_step: int, clock: StepClock) -> NoReturn:
        """Save all that the rest of the epoch needs, and raise LeftOnNotice."""
        loss_sum, num_real = self.losses.state()
        mean_loss_sum = self.member.sum_over_workers(loss_sum)[0] / self.member.world_size
        self.log.leave(
            epoch,
            next_step,
            lambda: {**self.state_dict(), "losses": (mean_loss_sum, num_real), "seconds": clock.seconds},
            {name: torch.from_numpy(column) for name, column in self.recorder.records().items()},
        )

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; steps are counted over all epochs."""
        config, num_steps = self.config, self.plan.num_steps
        return cosine_lr(
            step, config.epochs * num_steps, scaled_lr(config), config.min_lr, config.warmup_epochs * num_steps
        )

    def _step(self, batches: list[Batch], num_real: int, clock: StepClock) -> torch.Tensor:
        """Update the network from this worker's micro-batches and record its predictions. Returns the loss."""
        loss = torch.zeros((), device=self.member.device)
        for position, batch in enumerate(batches):
            logits, part = forward_backward(
                self.network,
                batch.inputs,
                batch.targets,
                torch.from_numpy(batch.mask).to(self.member.device, non_blocking=True),
                num_real=num_real,
                is_last=position == len(batches) - 1,
                scaler=self.scaler,
                precision=self.precision,
                world_size=self.member.world_size,
            )
            loss += part
            # These are the logits of the training pass itself, so that recording needs no second pass over the pool.
            with clock.recording():
                self.recorder.add(batch.sample_ids, batch.mask, logits, batch.targets)
        update(self.optimizer, self.scaler)
        return loss

    def _write_records(self, epoch: int, records: dict[str, np.ndarray]) -> None:
        """Write this worker's records of an epoch."""
        run_dir, rank, world_size = self.job.run_dir, self.member.rank, self.member.world_size
        folder = run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch))
        table = pa.table(records, schema=schema.DYNAMICS_SCHEMA)
        filesystem.write_table(filesystem.join(folder, schema.rank_file(rank, world_size)), table)
        # An elastic group of another size may have written this epoch before it was lost. Its files divide the samples
        # otherwise and would give some of them a second record. They go once every rank has written.
        if world_size > 1:
            distributed.barrier()
        if rank == 0:
            current = {schema.rank_file(rank, world_size) for rank in range(world_size)}
            for path in run_dir.table_files(schema.DYNAMICS, schema.epoch_dir(epoch)):
                if filesystem.basename(path) not in current:
                    filesystem.delete(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the content of a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if "losses" not in state:
            return
        # It was saved within an epoch (`_leave`).
        self.losses.load_state(*state["losses"])
        self.earlier_s = state["seconds"]
        records = [{name: column.numpy() for name, column in part.items()} for part in state[PARTS]]
        self.recorder.resume(self.plan.num_rows_before(state[NEXT_STEP]), records)
