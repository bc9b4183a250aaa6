"""Proxy training beside a bare PyTorch loop, in memory and streamed; the recorder's cost; two workers beside one.

    python benchmarks/train.py [--quick]

The stage's own worker, in its own Ray Train group, takes turns by epochs with the loop that one writes first: the same
network, batch, augmentation, optimiser and threads, and nothing recorded; once in a process of its own, as one starts
it, and once in the worker's, with the memory that workers are given. On a GPU the network is ResNet-18 in bf16 and a
further loop reads through a torch DataLoader. Full size compiles the network, too. Medians over the turns.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from reporting import emit, peak_bytes
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from training import begin, ceiling, measure_in_worker, smooth_png, wait

from elfs_ray.config import Config, load_config
from elfs_ray.methods.training import augmentation
from elfs_ray.methods.training.networks import build_proxy_model
from elfs_ray.runtime.cluster import num_cpus, num_gpus, remote_progress
from elfs_ray.runtime.progress import Progress
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
    """One worker with every core, or a GPU, against loops in the same process."""
    config = _config(run_dir, on_gpu)
    image_ids, images = load_images(run_dir, SIZE)
    pool, chunks = scan_chunks(run_dir)
    with (
        Progress("turns", (rounds + 1) * len(pool.sample_ids), "images") as progress,
        remote_progress(progress) as board,
    ):
        job = ProxyTrainingJob(
            config=config.train,
            seed=0,
            num_classes=NUM_CLASSES,
            proxy_size=SIZE,
            run_dir=run_dir,
            data=[ray.put(read_pool(run_dir, image_ids)[0]), images],
            board=board,
            num_decoders=num_cpus(),
        )
        jobs = {"in_memory": job, "streamed": dataclasses.replace(job, data=[ray.put(pool), ray.put(chunks)])}
        if compiles:
            jobs["compiled"] = dataclasses.replace(job, config=dataclasses.replace(config.train, compile=True))
        gpus = 0.5 * on_gpu  # the bare loop's process has the rest
        results = measure_in_worker(_take_turns, run_dir, gpus, jobs=jobs, rounds=rounds)
    ours, name = results["in_memory"], config.train.network
    emit(f"{name}, in memory", ours, "images/s", "bare loop", results["bare"])
    emit(f"{name}, in memory", ours, "images/s", "bare loop in the worker's process", results["bare_here"])
    if "data_loader" in results:
        emit(f"{name}, in memory", ours, "images/s", "bare loop with a DataLoader", results["data_loader"])
    emit(f"{name}, streamed", results["streamed"], "images/s", "in memory", ours)
    if "compiled" in results:
        emit(f"{name}, compiled", results["compiled"], "images/s", "as it is", ours)
    emit("recorder's share of the time", results["recorder"], "share", "target", 0.01, less_is_better=True)
    emit("arithmetic", ours * results["flop"] / 1e9, "GFLOP/s", "matrix product", results["ceiling"] / 1e9)


def _measure_stage(run_dir: RunDir, num_samples: int, epochs: int, on_gpu: bool) -> None:
    """The stage as it is run, of one worker and of two with a core each; the size of what it writes."""
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
    """What a worker that streams takes for each further sample, from the peaks of an epoch over two pools."""
    peaks = {}
    for num_samples in MEMORY_SAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = RunDir(folder)
            _write_small_pool(run_dir, num_samples)
            pool, chunks = scan_chunks(run_dir)
            config = _config(run_dir, False, "train.network=small_cnn", "train.batch_size=1024", "train.device=cpu")
            with Progress("memory", num_samples, "images") as progress, remote_progress(progress) as board:
                data = [ray.put(pool), ray.put(chunks)]
                job = ProxyTrainingJob(
                    config=config.train,
                    seed=0,
                    num_classes=NUM_CLASSES,
                    proxy_size=SMALL_SIZE,
                    run_dir=run_dir,
                    data=data,
                    board=board,
                    num_decoders=1,
                )
                peaks[num_samples] = measure_in_worker(_peak_of_an_epoch, run_dir, gpus=0, job=job)
    (fewer, low), (more, high) = peaks.items()
    emit(f"streaming worker's peak, {more:,} samples", high / 2**20, "MiB", f"of {fewer:,} samples", low / 2**20)
    reference, size = f"decoded images of {SIZE} pixels", 3.0 * SIZE**2
    emit("streaming worker", (high - low) / (more - fewer), "bytes a sample", reference, size, less_is_better=True)


def _peak_of_an_epoch(job: ProxyTrainingJob) -> int:
    """Runs in the training worker: the largest resident memory of its process."""
    ProxyTrainingWorker(job).train_epoch(0)
    return peak_bytes()


def _write_small_pool(run_dir: RunDir, num_samples: int) -> None:
    """A thousand small images again and again, in files as embed leaves them."""
    rng = np.random.default_rng(0)
    files = [smooth_png(coarse, SMALL_SIZE) for coarse in rng.integers(0, 256, (1000, 4, 4, 3), dtype=np.uint8)]
    _write_tables(run_dir, num_samples, lambda ids: [files[i % 1000] for i in ids.tolist()], rows_per_chunk=4096)


def _take_turns(jobs: dict[str, ProxyTrainingJob], rounds: int) -> dict[str, float]:
    """Runs in the training worker: epochs of each contestant in turn, and what a matrix product reaches."""
    workers = {name: ProxyTrainingWorker(job) for name, job in jobs.items()}
    in_memory = workers["in_memory"]
    torch.set_num_threads(in_memory.job.num_decoders)
    shares: dict[str, list[float]] = {name: [] for name in workers}
    contestants: dict[str, Callable[[int], object]] = {
        name: partial(_train_and_share, worker, shares[name]) for name, worker in workers.items()
    }
    gpus = 0.5 if in_memory.member.device.type == "cuda" else 0
    plain_memory = {"env_vars": {"GLIBC_TUNABLES": ""}}
    process: Any = ray.remote(num_cpus=0, num_gpus=gpus, runtime_env=plain_memory)(_BareLoop)
    apart = process.remote(in_memory.job)
    contestants["bare"] = lambda epoch: ray.get(apart.train_epoch.remote(epoch))
    contestants["bare_here"] = _BareLoop(in_memory.job).train_epoch
    if in_memory.member.device.type == "cuda":
        contestants["data_loader"] = _data_loader_loop(in_memory.job)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, train_epoch in contestants.items():
            start_s = time.perf_counter()
            train_epoch(turn)
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start_s)
    num_samples = in_memory.plan.num_samples
    results = {name: num_samples / statistics.median(times) for name, times in seconds.items()}
    results["recorder"] = statistics.median(shares["in_memory"][1:])
    results["flop"], results["ceiling"] = (
        _flop_an_image(in_memory),
        ceiling(in_memory.member.device, in_memory.precision),
    )
    return results


def _train_and_share(worker: ProxyTrainingWorker, shares: list[float], epoch: int) -> None:
    """Train an epoch, up to its records on the host; add the recorder's share of the time to `shares`."""
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
    """A loop over a DataLoader that augments in 8 processes."""
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
    """Crops and flips one image at a time, as a Dataset does."""

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
    """Forward, backward, SGD on a (b, s, s, 3) uint8 batch."""

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
    """Floating-point operations of a training step, an image."""
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
            "select.hard_fraction=0.1",
            *overrides,
        ],
    )


def _write_pool(run_dir: RunDir, num_samples: int) -> None:
    """Smooth random images and labels, as embed and cluster leave them."""
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
