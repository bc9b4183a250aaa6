"""What a training worker does: the epochs, their records and metrics, and checkpoints on the way.

Memory beside the network's: O(batch), and at its peak some 110 bytes for each sample of its share, for the order of an
epoch and its records (106 measured where images are streamed, benchmarks/train.py). Images in memory are once in a
node's object store (training/reader.py).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
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
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR, load_checkpoint
from elfs_ray.stages.training.epoch_log import EpochLog
from elfs_ray.stages.training.reader import Augmenter, Batch, EmbeddingsAsTheyAre
from elfs_ray.stages.training.streamed_reader import make_reader
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

_EVENTS_EVERY = 16
_INIT_STREAM = 0x696E6974


@dataclass(frozen=True)
class WorkerJob:
    """What every training worker is given.

    `data` is a list of references to the object store: a TrainingPool, then decoded images (m, s, s, 3) uint8, the
    ChunkTable of images that are streamed, or for a linear proxy embeddings (m, d) float16.
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
        """Side of the square that the network sees."""
        return self.config.image_size or self.proxy_size


def train_worker(job: WorkerJob) -> None:
    """One worker of the group: every epoch that is left."""
    Worker(job).train()


def init_seed(seed: int) -> int:
    """The seed of torch's generator from which the network's weights come."""
    return int(hash_uint64(seed, _INIT_STREAM)) >> 1


class StepClock:
    """Seconds that an epoch waits for data and spends on recording.

    On a GPU recording is timed there, by events about every 16th batch; nothing waits for it until `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._start_s = time.perf_counter()
        self._waiting_s = self._recording_s = 0.0
        self._num_batches = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def next_step(self, steps: Iterator[tuple[int, list[Batch]]]) -> tuple[int, list[Batch]]:
        """The reader's next step."""
        start_s = time.perf_counter()
        step = next(steps)
        self._waiting_s += time.perf_counter() - start_s
        return step

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the recording of one batch."""
        self._num_batches += 1
        if self._device.type == "cpu":
            start_s = time.perf_counter()
            yield
            self._recording_s += time.perf_counter() - start_s
        elif self._num_batches % _EVENTS_EVERY == 1:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            yield

    def take(self) -> dict[str, float]:
        """seconds of the epoch, and the shares of it for data and recording; the next epoch starts now."""
        if self._events:
            torch.cuda.synchronize(self._device)
            timed_s = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._recording_s = timed_s / len(self._events) * self._num_batches
        seconds = time.perf_counter() - self._start_s
        shares = {"data_wait_share": self._waiting_s / seconds, "recorder_share": self._recording_s / seconds}
        self._reset()
        return {"seconds": seconds, **shares}


class Worker:
    """One worker's training: its reader, model and optimiser, and the epoch to go on with. Made within Ray Train."""

    def __init__(self, job: WorkerJob):
        self.job, self.config = job, job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.precision = resolve_precision(self.config.precision, self.device)

        pool, inputs = ray.get(job.data)
        self.sample_ids = pool.sample_ids
        num_samples = len(self.sample_ids)
        is_linear = self.config.network == LINEAR
        self.plan = BatchPlan(
            num_samples, self.config.batch_size, self.rank, self.world_size, self.config.micro_batch_size
        )
        self.reader = make_reader(
            pool,
            inputs,
            EmbeddingsAsTheyAre(job.seed) if is_linear else Augmenter(self.config, job.seed, job.size),
            self.plan,
            self.device,
            proxy_size=job.proxy_size,
            num_decoders=job.num_decoders,
        )
        self.model = self._make_model(inputs.shape[1] if is_linear else None)
        self.optimizer = make_optimizer(
            self.model,
            lr=scaled_lr(self.config),
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            nesterov=self.config.nesterov,
        )
        self.scaler = make_grad_scaler(self.precision, self.device)
        self.log = EpochLog("train", job.run_dir, job.board, num_samples, self.rank, self.world_size, self.device)
        self.first_epoch = self._load_checkpoint()
        self.network = data_parallel(self.model) if self.world_size > 1 else self.model

    def _make_model(self, dim: int | None) -> nn.Module:
        """The network on images or, where their `dim` is given, the linear classifier of embeddings."""
        torch.manual_seed(init_seed(self.job.seed))
        if dim is None:
            model = build_proxy_model(self.config.network, self.job.num_classes)
        else:
            model = build_linear_model(dim, self.job.num_classes)
        model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.compile:
            model.compile()
        return model

    def train(self) -> None:
        """Every epoch that is left."""
        recorder, monitor, clock = (
            DynamicsRecorder(self.plan.num_rows, self.device),
            LossMonitor(),
            StepClock(self.device),
        )
        for epoch in range(self.first_epoch, self.config.epochs):
            clock.take()
            lr = self.train_epoch(epoch, recorder, monitor, clock)
            records = recorder.finish()
            metrics = self._metrics(epoch, records, monitor.finish(), lr, clock)
            self._write_records(epoch, records)
            self.log.end_epoch(
                epoch,
                metrics,
                _note(metrics, self.config.epochs),
                self._state,
                num_epochs=self.config.epochs,
                is_last=epoch == self.config.epochs - 1,
            )

    def train_epoch(self, epoch: int, recorder: DynamicsRecorder, monitor: LossMonitor, clock: StepClock) -> float:
        """One pass over the pool. Returns the last learning rate."""
        config, plan = self.config, self.plan
        steps = self.reader.steps(epoch)
        for index in range(plan.num_steps):
            num_real, batches = clock.next_step(steps)
            lr = cosine_lr(
                epoch * plan.num_steps + index,
                config.epochs * plan.num_steps,
                scaled_lr(config),
                config.min_lr,
                config.warmup_epochs * plan.num_steps,
            )
            set_learning_rate(self.optimizer, lr)
            loss = torch.zeros((), device=self.device)
            for position, batch in enumerate(batches):
                logits, part = forward_backward(
                    self.network,
                    batch.inputs,
                    batch.targets,
                    torch.from_numpy(batch.mask).to(self.device, non_blocking=True),
                    num_real=num_real,
                    is_last=position == len(batches) - 1,
                    scaler=self.scaler,
                    precision=self.precision,
                    world_size=self.world_size,
                )
                loss += part
                with clock.recording():
                    recorder.add(batch.sample_ids, batch.mask, logits, batch.targets)
            update(self.optimizer, self.scaler)
            monitor.add(loss, num_real=num_real, epoch=epoch, step=index, lr=lr)
            self.log.end_step(epoch, (index + 1) * config.batch_size)
        return lr

    def _metrics(
        self, epoch: int, records: dict[str, np.ndarray], loss: float, lr: float, clock: StepClock
    ) -> dict[str, float]:
        """Loss, accuracy against pseudo-labels, images a second and where the time went, over all workers."""
        times = clock.take()
        margins = records[schema.TARGET_PROB] - records[schema.MAX_OTHER_PROB]
        own = [float((margins > 0).sum()), loss, times["data_wait_share"], times["recorder_share"]]
        num_right, loss_sum, waiting, recording = self._sum_over_workers(np.array(own)).tolist()
        return {
            "epoch": epoch,
            "loss": loss_sum / self.world_size,
            "accuracy": num_right / self.plan.num_samples,
            "lr": lr,
            "seconds": times["seconds"],
            "images_per_s": self.plan.num_samples / times["seconds"],
            "data_wait_share": waiting / self.world_size,
            "recorder_share": recording / self.world_size,
            "workers": self.world_size,
        }

    def _sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def _write_records(self, epoch: int, records: dict[str, np.ndarray]) -> None:
        """Write this worker's records; rank 0 then removes what a group of another size left of this epoch."""
        run_dir = self.job.run_dir
        folder = run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch))
        table = pa.table(records, schema=schema.DYNAMICS_SCHEMA)
        filesystem.write_table(filesystem.join(folder, schema.rank_file(self.rank, self.world_size)), table)
        if self.world_size > 1:
            distributed.barrier()
        if self.rank == 0:
            current = {schema.rank_file(rank, self.world_size) for rank in range(self.world_size)}
            for path in run_dir.table_files(schema.DYNAMICS, schema.epoch_dir(epoch)):
                if filesystem.basename(path) not in current:
                    filesystem.delete(path)

    def _state(self, next_epoch: int) -> dict[str, Any]:
        """A checkpoint, whose presence means that the records of all epochs before `next_epoch` are on disk."""
        return {
            "next_epoch": next_epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _load_checkpoint(self) -> int:
        """Restore the last reported state, if there is one; the epoch to go on with."""
        state = load_checkpoint(self.job.run_dir.path("train", CHECKPOINTS_DIR))
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        return int(state["next_epoch"])


def _note(metrics: dict[str, float], num_epochs: int) -> str:
    return (
        f"epoch {metrics['epoch'] + 1}/{num_epochs}, loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
        f"{metrics['images_per_s']:,.0f} images/s, {metrics['data_wait_share']:.0%} waiting for data"
    )
