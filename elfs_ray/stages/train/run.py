"""train: train a proxy network on the pseudo-labels and record its predictions for every sample in every epoch.

Reads   clusters/pseudo_labels, proxy_images/ (embeddings/ for train.network=linear)
Writes  dynamics/epoch=NNN/ (one file a worker), train/history/ (one file an epoch), train/checkpoints/,
        train/reading.txt (memory or streamed, chosen once)

Ray Train runs the workers (worker_group.py, worker.py), and DDP (gloo or NCCL) averages their gradients; a single one
for a small pool runs in this process. An epoch's records are written before its checkpoint, so a checkpoint proves that
they are on disk; an epoch that is trained again overwrites its files. Every random choice is a function of the seed,
the epoch and the sample, so a resumed run equals an undisturbed one with as many workers.
"""

from concurrent.futures import ThreadPoolExecutor

from elfs_ray.config import LINEAR, Config
from elfs_ray.runtime.cluster import devices_of_cluster
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.train import FROM_EMBEDDINGS, TrainResult, needs_whole_images, request_proxy_workers
from elfs_ray.stages.train.worker import ProxyTrainingJob, train_proxy
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR
from elfs_ray.stages.training.epoch_log import read_metrics
from elfs_ray.stages.training.reader import choose_reading, load_embeddings
from elfs_ray.stages.training.streamed_reader import load_data
from elfs_ray.stages.training.worker_group import WorkerGroup, run_workers
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

FOOTER_THREADS = 32


def run_train(config: Config, run_dir: RunDir) -> TrainResult:
    """Train the proxy network and record its training dynamics.

    Raises RuntimeError with the workers' message if training gives up. It gives up without a retry if the loss is not
    finite or a proxy image cannot be decoded. Also raises RuntimeError if records of a finished epoch are missing.
    """
    num_samples = ClusterResult.read(run_dir).rows
    reading = _choose_reading(config, run_dir, num_samples)
    _train(config, run_dir, reading, num_samples)
    history = [read_metrics(run_dir, "train", epoch) for epoch in range(config.train.epochs)]
    _check_records(run_dir, num_samples, len(history))
    return TrainResult(
        rows=num_samples,
        epochs=len(history),
        workers=int(history[-1]["workers"]),
        reading=reading,
        history=history,
    )


def _choose_reading(config: Config, run_dir: RunDir, num_samples: int) -> str:
    if config.train.network == LINEAR:
        return FROM_EMBEDDINGS
    return choose_reading(
        run_dir,
        "train",
        config.train.reading,
        num_samples,
        config.embed.proxy_image_size,
        needs_whole_images=needs_whole_images(config),
    )


def _train(config: Config, run_dir: RunDir, reading: str, num_samples: int) -> None:
    """Run the workers until the records and metrics of every epoch are on disk."""
    train, proxy_size = config.train, config.embed.proxy_image_size
    request = request_proxy_workers(config, devices_of_cluster(), reading)
    group = WorkerGroup(
        folder=run_dir.path("train"), name=CHECKPOINTS_DIR, request=request, max_failures=train.max_failures
    )
    total = num_samples * train.epochs
    with Progress("train", total, "images") as progress, remote_progress(progress) as board:

        def make_job() -> ProxyTrainingJob:
            data = load_embeddings(run_dir) if reading == FROM_EMBEDDINGS else load_data(run_dir, reading, proxy_size)
            return ProxyTrainingJob(
                config=train,
                seed=config.seed,
                num_classes=ClusterResult.read(run_dir).num_clusters,
                proxy_size=proxy_size,
                run_dir=run_dir,
                data=data,
                board=board,
                num_decoders=request.cpus,
            )

        run_workers(group, train_proxy, make_job)


def _check_records(run_dir: RunDir, num_samples: int, num_epochs: int) -> None:
    """Raise RuntimeError for an epoch that has not one record of each sample."""
    # A resumed run trains only the epochs after its checkpoint: records of earlier ones that somebody deleted would be
    # missed only in stage select, hours later.
    epochs = [run_dir.table_files(schema.DYNAMICS, schema.epoch_dir(epoch)) for epoch in range(num_epochs)]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        counts = [sum(threads.map(filesystem.num_rows, paths)) for paths in epochs]
    for epoch, count in enumerate(counts):
        if count != num_samples:
            raise RuntimeError(
                f"{run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch))} has {count} records for {num_samples} "
                f"samples, and training is past that epoch: delete {run_dir.path('train')} and "
                f"{run_dir.path(schema.DYNAMICS)}, then run again"
            )
