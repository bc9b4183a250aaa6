"""Measure proxy training vs. a bare PyTorch loop, in memory and streamed; the cost of recording; two workers vs. one.

    python benchmarks/train.py [--quick]

The stage's worker, in a Ray Train group, takes turns by epochs with the loop that one writes first: the same network,
batch, augmentation, optimiser and threads, but nothing is recorded. The loop runs in a separate process, as one would
start it, and also in the worker's process, with the worker's settings of memory allocation. On a GPU the network is
ResNet-18 in bf16, and a further loop reads through a torch DataLoader. The full size also compiles the network. Rates
are medians over the turns.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from helpers.reporting import emit, peak_bytes
from helpers.training import begin, ceiling, images_per_s, measure_in_worker, smooth_png, wait
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from elfs_ray.config import Config, load_config
from elfs_ray.methods.training import augmentation
from elfs_ray.methods.training.networks import build_proxy_model
from elfs_ray.runtime.cluster import num_cpus, num_gpus
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.train.run import run_train
from elfs_ray.stages.train.worker import ProxyTrainingJob, ProxyTrainingWorker
from elfs_ray.stages.training.reader import load_images, read_pool
from elfs_ray.stages.training.streamed_reader import scan_chunks
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

SIZE, NUM_CLASSES, BATCH = 32, 10, 256
ROWS_PER_FILE, ROWS_PER_CHUNK = 4096, 256
MEMORY_SAMPLES, SMALL_SIZE = (100_000, 1_000_000), 8


def main() -> None:
    quick = begin(__doc__)
    on_gpu = num_gpus() > 0
    num_samples = 25_600 if on_gpu else 2_048 if quick else 10_240
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        _write_pool(run_dir, num_samples)
        _measure_worker(run_dir, rounds=3 if quick else 7, on_gpu=on_gpu, compiles=not quick)
        if not quick:
            _measure_stage(run_dir, num_samples, epochs=7, on_gpu=on_gpu)
    if not quick:
        _measure_memory()


def _measure_worker(run_dir: RunDir, rounds: int, on_gpu: bool, compiles: bool) -> None:
    """Measure a worker with all cores or a GPU vs. loops in the same and in a separate process."""
    config = _config(run_dir, on_gpu)
    image_ids, images = load_images(run_dir, SIZE)
    pool, chunks = scan_chunks(run_dir)
    with (
        Progress("turns", (rounds + 1) * len(pool.sample_ids), "images") as progress,
        remote_progress(progress) as board,
    ):
        data = [ray.put(read_pool(run_dir, image_ids)[0]), images]
        job = _job(config, run_dir, data, board, SIZE, num_cpus())
        jobs = {"in_memory": job, "streamed": dataclasses.replace(job, data=[ray.put(pool), ray.put(chunks)])}
        if compiles:
            jobs["compiled"] = dataclasses.replace(job, config=dataclasses.replace(config.train, compile=True))
        gpus = 0.5 * on_gpu  # the process of the bare loop has the other half
        results = measure_in_worker(_take_turns, run_dir, gpus, jobs=jobs, rounds=rounds)
    ours, name = results["in_memory"], config.train.network
    emit(f"{name}, in memory", ours, "images/s", "bare loop", results["bare"])
    emit(f"{name}, in memory", ours, "images/s", "bare loop in the worker's process", results["bare_here"])
    if "data_loader" in results:
        emit(f"{name}, in memory", ours, "images/s", "bare loop with a DataLoader", results["data_loader"])
    emit(f"{name}, streamed", results["streamed"], "images/s", "in memory", ours)
    if "compiled" in results:
        emit(f"{name}, compiled", results["compiled"], "images/s", "not compiled", ours)
    emit("recorder's share of the time", results["recorder"], "share", "target", 0.01, less_is_better=True)
    emit("arithmetic", ours * results["flop"] / 1e9, "GFLOP/s", "matrix product", results["ceiling"] / 1e9)


def _job(
    config: Config, run_dir: RunDir, data: list[Any], board: Any, proxy_size: int, num_decoders: int
) -> ProxyTrainingJob:
    return ProxyTrainingJob(
        config=config.train,
        seed=0,
        num_classes=NUM_CLASSES,
        proxy_size=proxy_size,
        run_dir=run_dir,
        data=data,
        board=board,
        num_decoders=num_decoders,
    )


def _measure_stage(run_dir: RunDir, num_samples: int, epochs: int, on_gpu: bool) -> None:
    """Measure the stage with one worker and with two, of one core each, and the bytes that it writes."""
    rates = {}
    for num_workers in (1, 2):
        if on_gpu and num_workers > num_gpus():
            return
        overrides = [f"train.epochs={epochs}", f"train.num_workers={num_workers}", "train.cpus_per_worker=1"]
        for table in ("dynamics", "train"):
            filesystem.delete(run_dir.path(table))
        result = run_train(_config(run_dir, on_gpu, *overrides), run_dir)
        rates[num_workers] = statistics.median(metrics["images_per_s"] for metrics in result.history[1:])
        files = filesystem.list_files(run_dir.path(schema.DYNAMICS), recursive=True)
        num_bytes = sum(info.size for info in files) / num_samples / epochs
    emit("two workers", rates[2], "images/s", "one worker of the same threads", rates[1])
    for num_classes in (10, 1000):
        reference = f"logits of {num_classes} classes"
        emit("dynamics", num_bytes, "bytes a sample and epoch", reference, 4.0 * num_classes, less_is_better=True)


def _measure_memory() -> None:
    """Measure the memory that each sample adds to a streaming worker, from the peaks of an epoch over two pools."""
    peaks = {}
    for num_samples in MEMORY_SAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = RunDir(folder)
            _write_small_pool(run_dir, num_samples)
            pool, chunks = scan_chunks(run_dir)
            config = _config(run_dir, False, "train.network=small_cnn", "train.batch_size=1024", "train.device=cpu")
            with Progress("memory", num_samples, "images") as progress, remote_progress(progress) as board:
                job = _job(config, run_dir, [ray.put(pool), ray.put(chunks)], board, SMALL_SIZE, 1)
                peaks[num_samples] = measure_in_worker(_peak_of_an_epoch, run_dir, gpus=0, job=job)
    (fewer, low), (more, high) = peaks.items()
    emit(f"streaming worker's peak, {more:,} samples", high / 2**20, "MiB", f"of {fewer:,} samples", low / 2**20)
    reference, size = f"decoded images of {SIZE} pixels", 3.0 * SIZE**2
    emit("streaming worker", (high - low) / (more - fewer), "bytes a sample", reference, size, less_is_better=True)


def _peak_of_an_epoch(job: ProxyTrainingJob) -> int:
    """Return the largest resident memory of the process after an epoch. Runs in the training worker."""
    ProxyTrainingWorker(job).train_epoch(0)
    return peak_bytes()


def _write_small_pool(run_dir: RunDir, num_samples: int) -> None:
    """Write a thousand small images repeatedly, in files as the stage embed writes them."""
    rng = np.random.default_rng(0)
    files = [smooth_png(coarse, SMALL_SIZE) for coarse in rng.integers(0, 256, (1000, 4, 4, 3), dtype=np.uint8)]
    _write_tables(run_dir, num_samples, lambda ids: [files[i % 1000] for i in ids.tolist()], rows_per_chunk=4096)


def _take_turns(jobs: dict[str, ProxyTrainingJob], rounds: int) -> dict[str, float]:
    """Measure epochs of each contestant in turn, and a matrix product. Runs in the training worker."""
    workers = {name: ProxyTrainingWorker(job) for name, job in jobs.items()}
    in_memory = workers["in_memory"]
    torch.set_num_threads(in_memory.job.num_decoders)
    shares: dict[str, list[float]] = {name: [] for name in workers}
    contestants: dict[str, Callable[[int], object]] = {
        name: partial(_train_and_share, worker, shares[name]) for name, worker in workers.items()
    }
    gpus = 0.5 if in_memory.member.device.type == "cuda" else 0
    # Without the workers' huge pages, and with no CPU of its own: the contestants take turns.
    default_memory = {"env_vars": {"GLIBC_TUNABLES": ""}}
    actor: Any = ray.remote(num_cpus=0, num_gpus=gpus, runtime_env=default_memory)(_BareLoop)
    separate = actor.remote(in_memory.job)
    contestants["bare"] = lambda epoch: ray.get(separate.train_epoch.remote(epoch))
    contestants["bare_here"] = _BareLoop(in_memory.job).train_epoch
    if in_memory.member.device.type == "cuda":
        contestants["data_loader"] = _data_loader_loop(in_memory.job)
    device = in_memory.member.device
    return images_per_s(contestants, in_memory.plan.num_samples, rounds, device) | {
        "recorder": statistics.median(shares["in_memory"][1:]),  # without the epoch that warms up
        "flop": _flop_an_image(in_memory),
        "ceiling": ceiling(device, in_memory.precision),
    }


def _train_and_share(worker: ProxyTrainingWorker, shares: list[float], epoch: int) -> None:
    """Train an epoch until its records are on the host, and append the recorder's share of the time to `shares`."""
    metrics, _ = worker.train_epoch(epoch)
    shares.append(metrics["recorder_share"])


class _BareLoop:
    """A loop over images in memory."""

    def __init__(self, job: ProxyTrainingJob):
        torch.set_num_threads(job.num_decoders)
        pool, decoded = ray.get(job.data)
        self._step = _BareStep(job)
        self._images = torch.from_numpy(decoded.copy()).to(self._step.device)
        self._targets = torch.from_numpy(pool.targets.astype(np.int64)).to(self._step.device)

    def train_epoch(self, epoch: int) -> None:
        flat = self._images.view(len(self._images), -1)
        order = torch.randperm(len(flat))
        for rows in order.split(BATCH):
            rows = rows.to(flat.device)
            batch = flat.index_select(0, rows).view(len(rows), *self._images.shape[1:])
            batch = augmentation.random_crop_flip(batch, rows.cpu().numpy(), seed=0, epoch=epoch)
            self._step(batch, self._targets[rows])
        wait(flat.device)


def _data_loader_loop(job: ProxyTrainingJob) -> Callable[[int], None]:
    """Return a loop over a DataLoader that augments in 8 processes."""
    pool, decoded = ray.get(job.data)
    loader = DataLoader(
        _Images(decoded, pool.targets),
        BATCH,
        shuffle=True,
        num_workers=8,
        persistent_workers=True,
        pin_memory=True,
        multiprocessing_context="forkserver",
    )
    step = _BareStep(job)

    def train_epoch(epoch: int) -> None:
        for batch, targets in loader:
            step(batch.to(step.device, non_blocking=True), targets.to(step.device, non_blocking=True))
        wait(step.device)

    return train_epoch


class _Images(Dataset):
    """A dataset that crops and flips one image at a time."""

    def __init__(self, images: np.ndarray, targets: np.ndarray):
        self._images, self._targets = images, targets

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = np.pad(self._images[row], ((4, 4), (4, 4), (0, 0)), mode="reflect")
        top, left, flip = np.random.default_rng().integers((9, 9, 2))
        crop = image[top : top + SIZE, left : left + SIZE]
        return torch.from_numpy((crop[:, ::-1] if flip else crop).copy()), int(self._targets[row])


class _BareStep:
    """A step of SGD on a (b, s, s, 3) uint8 batch."""

    def __init__(self, job: ProxyTrainingJob):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config = job.config
        model = build_proxy_model(job.config.network, NUM_CLASSES)
        self._model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True
        )

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        images = augmentation.normalize(images, self._config.mean, self._config.std)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self._model(images)
        nn.functional.cross_entropy(logits.float(), targets).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _flop_an_image(worker: ProxyTrainingWorker) -> float:
    """Return the floating-point operations of a training step for an image."""
    model = build_proxy_model(worker.config.network, NUM_CLASSES)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(BATCH, 3, SIZE, SIZE)).sum().backward()
    return counter.get_total_flops() / BATCH


def _config(run_dir: RunDir, on_gpu: bool, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"run_dir={run_dir.uri}",
            "pool.uri=/made/up",
            "budget=0.1",
            "embed.encoder=pixels",
            f"embed.proxy_image_size={SIZE}",
            f"cluster.num_clusters={NUM_CLASSES}",
            f"train.network={'resnet18' if on_gpu else 'small_cnn'}",
            "train.epochs=1000",
            f"train.batch_size={BATCH}",
            "train.num_workers=1",
            "train.lr=0.01",
            "select.method=double_end",
            "select.hard_fraction=0.1",
            *overrides,
        ],
    )


def _write_pool(run_dir: RunDir, num_samples: int) -> None:
    """Write smooth random images and labels as the stages embed and cluster do."""
    rng = np.random.default_rng(0)

    def images_of(ids: np.ndarray) -> list[bytes]:
        return [smooth_png(coarse, SIZE) for coarse in rng.integers(0, 256, (len(ids), 8, 8, 3), dtype=np.uint8)]

    _write_tables(run_dir, num_samples, images_of, ROWS_PER_CHUNK)


def _write_tables(
    run_dir: RunDir, num_samples: int, images_of: Callable[[np.ndarray], list[bytes]], rows_per_chunk: int
) -> None:
    rng = np.random.default_rng(1)
    for first in range(0, num_samples, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_samples))
        name = schema.range_file(int(ids[0]), int(ids[-1]))
        table = pa.table([ids, images_of(ids)], schema=schema.PROXY_IMAGES_SCHEMA)
        filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, name), table, rows_per_chunk)
        labels = [ids, rng.integers(0, NUM_CLASSES, len(ids), dtype=np.int32), np.zeros(len(ids), np.float32)]
        table = pa.table(labels, schema=schema.PSEUDO_LABELS_SCHEMA)
        filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, name), table)
    result = ClusterResult(num_samples, NUM_CLASSES, "file", workers=1, sizes=[])
    run_dir.mark_complete(Marker("cluster", {}, {}, result.to_json()))


if __name__ == "__main__":
    main()
