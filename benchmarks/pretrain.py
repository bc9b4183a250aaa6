"""Measure pretraining vs. a bare loop of the same method and vs. the peak rate of a matrix product.

    python benchmarks/pretrain.py [--quick]

The stage's worker, in a Ray Train group, takes turns by epochs with the loop that one writes first: the same network,
batch, augmentation, optimiser and threads, but no metrics and no checkpoints. On a GPU the network is ResNet-18 in
bf16, and once in fp16. Rates are medians over the turns. The full size also compiles the network, and compares two
workers with one where there are two GPUs.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from helpers.reporting import emit
from helpers.training import begin, ceiling, images_per_s, measure_in_worker, smooth_png
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from elfs_ray.config import Config, load_config
from elfs_ray.methods.simclr.training import MEAN, STD, simclr_settings
from elfs_ray.methods.simclr.views import change_colors, two_crops
from elfs_ray.methods.training.networks import build_backbone
from elfs_ray.runtime.cluster import num_cpus, num_gpus
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.stages.copy import CopyResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.pretrain.run import run_pretrain
from elfs_ray.stages.pretrain.worker import PretrainJob, PretrainWorker
from elfs_ray.stages.training.reader import every_image
from elfs_ray.stages.training.streamed_reader import load_data
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

SIZE = 32
ROWS_PER_FILE, ROWS_PER_CHUNK = 4096, 256


def main() -> None:
    quick = begin(__doc__)
    on_gpu = num_gpus() > 0
    num_samples = 50_000 if on_gpu else 768 if quick else 5_120
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        _write_pool(run_dir, num_samples)
        _measure_worker(run_dir, rounds=7, on_gpu=on_gpu, compiles=not quick)
        if not quick and num_gpus() > 1:
            _measure_workers(run_dir)


def _measure_worker(run_dir: RunDir, rounds: int, on_gpu: bool, compiles: bool) -> None:
    """Measure a worker with all cores or a GPU vs. a loop in the same process."""
    config = _config(run_dir, on_gpu)
    settings = simclr_settings(vars(config.pretrain), SIZE)
    num_samples = CopyResult.read(run_dir).rows
    with Progress("turns", (rounds + 1) * num_samples, "images") as progress, remote_progress(progress) as board:
        job = PretrainJob(
            settings=settings,
            precision="auto",
            compile=False,
            seed=0,
            image_size=SIZE,
            proxy_size=SIZE,
            run_dir=run_dir,
            data=load_data(run_dir, "memory", SIZE, every_image),
            board=board,
            num_decoders=num_cpus(),
        )
        variants = {"compiled": dataclasses.replace(job, compile=True)} if compiles else {}
        if on_gpu:
            variants["in fp16"] = dataclasses.replace(job, precision="fp16")
        jobs = {"ours": job, **variants}
        results = measure_in_worker(_take_turns, run_dir, gpus=float(on_gpu), jobs=jobs, rounds=rounds)
    emit(settings.network, results["ours"], "images/s", "bare loop", results["bare"])
    for name in variants:
        emit(
            f"{settings.network}, {name}",
            results[name],
            "images/s",
            "default settings",
            results["ours"],
        )
    arithmetic = results["ours"] * results["flop"] / 1e9
    emit("arithmetic", arithmetic, "GFLOP/s", "matrix product", results["ceiling"] / 1e9)


def _measure_workers(run_dir: RunDir) -> None:
    """Run the stage with one worker and with two, each with a GPU."""
    rates = {}
    for num_workers in (1, 2):
        filesystem.delete(run_dir.path("pretrain"))
        overrides = ("pretrain.epochs=4", f"pretrain.num_workers={num_workers}", "pretrain.cpus_per_worker=1")
        history = run_pretrain(_config(run_dir, True, *overrides), run_dir).history
        rates[num_workers] = statistics.median(metrics["images_per_s"] for metrics in history[1:])
    emit("two workers", rates[2], "images/s", "one worker of the same threads", rates[1])


def _take_turns(jobs: dict[str, PretrainJob], rounds: int) -> dict[str, float]:
    """Measure epochs of each contestant in turn, and a matrix product. Runs in the training worker."""
    workers = {name: PretrainWorker(job) for name, job in jobs.items()}
    worker = workers["ours"]
    torch.set_num_threads(worker.job.num_decoders)
    contestants: dict[str, Callable[[int], Any]] = {name: each.train_epoch for name, each in workers.items()}
    contestants["bare"] = _BareLoop(worker).train_epoch
    return images_per_s(contestants, worker.plan.num_samples, rounds, worker.member.device) | {
        "flop": _flop_an_image(worker),
        "ceiling": ceiling(worker.member.device, worker.trainer.precision),
    }


class _BareLoop:
    """A loop of SimCLR over images in memory, as one writes it first."""

    def __init__(self, worker: PretrainWorker) -> None:
        pool, decoded = ray.get(worker.job.data)
        self._images = torch.from_numpy(decoded.copy()).to(worker.member.device)
        self._sample_ids, self._settings = pool.sample_ids, worker.settings
        self._device, self._batch = worker.member.device, worker.plan.global_batch
        self._bf16 = worker.trainer.precision == "bf16"
        backbone, dim = build_backbone(worker.settings.network)
        hidden = worker.settings.hidden_dim
        self._model = nn.Sequential(
            backbone,
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, worker.settings.projection_dim),
        ).to(device=worker.member.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=True
        )

    def train_epoch(self, epoch: int) -> None:
        flat, order = self._images.flatten(1), torch.randperm(len(self._images))
        for rows, on_device in zip(order.split(self._batch), order.to(self._device).split(self._batch), strict=True):
            sample_ids, views = self._sample_ids[rows.numpy()], self._settings.views
            batch = flat.index_select(0, on_device).view(len(rows), SIZE, SIZE, 3)
            crops = two_crops(batch, sample_ids, views, seed=0, epoch=epoch, size=SIZE)
            images = [
                change_colors(crops[:, view], sample_ids, views, MEAN, STD, seed=0, epoch=epoch, view=view)
                for view in range(2)
            ]
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                projections = self._model(torch.cat(images))
            unit = functional.normalize(projections.float(), dim=1)
            logits = (unit @ unit.T / self._settings.temperature).fill_diagonal_(-torch.inf)
            targets = torch.arange(2 * len(rows), device=self._device).roll(len(rows))
            functional.cross_entropy(logits, targets).backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def _flop_an_image(worker: PretrainWorker) -> float:
    """Return the floating-point operations of a training step for an image, that is for two views."""
    backbone, _ = build_backbone(worker.settings.network)
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(64, 3, SIZE, SIZE)).sum().backward()
    return 2 * counter.get_total_flops() / 64


def _config(run_dir: RunDir, on_gpu: bool, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"run_dir={run_dir.uri}",
            "pool.uri=/made/up",
            "budget=0.1",
            "embed.encoder=self_supervised",
            f"embed.proxy_image_size={SIZE}",
            "cluster.num_clusters=10",
            "select.method=double_end",
            "select.hard_fraction=0.1",
            f"pretrain.profile={'gpu' if on_gpu else 'cpu'}",
            "pretrain.epochs=1000",
            "pretrain.lr=0.01",
            *overrides,
        ],
    )


def _write_pool(run_dir: RunDir, num_samples: int) -> None:
    """Write smooth random images as the stage copy does."""
    rng = np.random.default_rng(0)
    for first in range(0, num_samples, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_samples))
        images = [smooth_png(coarse, SIZE) for coarse in rng.integers(0, 256, (len(ids), 8, 8, 3), dtype=np.uint8)]
        table = pa.table([ids, images], schema=schema.PROXY_IMAGES_SCHEMA)
        name = schema.range_file(int(ids[0]), int(ids[-1]))
        filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, name), table, ROWS_PER_CHUNK)
    for result in (IndexResult(num_samples, 1, "folder", []), CopyResult(num_samples, 0)):
        run_dir.mark_complete(Marker(result.stage, {}, {}, result.to_json()))


if __name__ == "__main__":
    main()
