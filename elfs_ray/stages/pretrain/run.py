"""pretrain: train an encoder on the pool itself, without labels and without pretrained weights.

Reads   proxy_images/
Writes  pretrain/encoder.pt (embed.weights of a later run can name it), pretrain/history/ (one file an epoch),
        pretrain/checkpoints/, pretrain/reading.txt (memory or streamed, chosen once)

Runs before embed, with embed.encoder=self_supervised. The method is SimCLR (methods/simclr/loss.py says why). Ray Train
runs the workers (worker_group.py, worker.py), DDP (gloo or NCCL) averages their gradients, and the readers are those of
proxy training (training/reader.py); a single worker for a small pool runs in this process. Every random choice is a
function of the seed, the epoch, the sample and the view, so a resumed run equals an undisturbed one with as many
workers. A lost worker costs one epoch, or the epochs of the last minute.
"""

import dataclasses

from elfs_ray.config import Config
from elfs_ray.methods.simclr.training import SimclrSettings, simclr_settings
from elfs_ray.runtime.cluster import devices_of_cluster
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.runtime.resources import Request
from elfs_ray.stages.copy import CopyResult
from elfs_ray.stages.pretrain import PretrainResult, request_pretraining_workers
from elfs_ray.stages.pretrain.worker import PretrainJob, pretrain_worker
from elfs_ray.stages.training.checkpoints import CHECKPOINTS_DIR
from elfs_ray.stages.training.epoch_log import read_metrics
from elfs_ray.stages.training.reader import choose_reading, every_image
from elfs_ray.stages.training.streamed_reader import load_data
from elfs_ray.stages.training.worker_group import WorkerGroup, run_workers
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


def run_pretrain(config: Config, run_dir: RunDir) -> PretrainResult:
    """Train the encoder and write it to a file.

    Raises RuntimeError with the workers' message if training gives up. It gives up without a retry if the loss is not
    finite, the encoder has collapsed, or a copy cannot be decoded.
    """
    pretrain, proxy_size = config.pretrain, config.embed.proxy_image_size
    num_samples = CopyResult.read(run_dir).rows
    reading = choose_reading(run_dir, "pretrain", pretrain.reading, num_samples, proxy_size, needs_whole_images=False)
    request = request_pretraining_workers(config, devices_of_cluster(), reading)
    settings = simclr_settings(vars(pretrain), pretrain.image_size or proxy_size)
    if settings.epochs == 0:
        say("pretrain  no epochs: the encoder stays untrained")
    _train(config, run_dir, settings, request, reading)
    encoder = run_dir.path("pretrain", schema.ENCODER_FILE)
    say(f"pretrain  the encoder is {encoder}")
    history = [read_metrics(run_dir, "pretrain", epoch) for epoch in range(settings.epochs)]
    return PretrainResult(
        rows=num_samples,
        epochs=settings.epochs,
        workers=request.most,
        reading=reading,
        settings=dataclasses.asdict(settings),
        encoder=encoder,
        history=history,
    )


def _train(config: Config, run_dir: RunDir, settings: SimclrSettings, request: Request, reading: str) -> None:
    """Run the workers until the metrics of every epoch and the encoder are on disk."""
    pretrain, proxy_size = config.pretrain, config.embed.proxy_image_size
    group = WorkerGroup(
        folder=run_dir.path("pretrain"), name=CHECKPOINTS_DIR, request=request, max_failures=pretrain.max_failures
    )
    total = CopyResult.read(run_dir).rows * settings.epochs
    with Progress("pretrain", total, "images") as progress, remote_progress(progress) as board:

        def make_job() -> PretrainJob:
            return PretrainJob(
                settings=settings,
                precision=pretrain.precision,
                compile=pretrain.compile,
                seed=config.seed,
                image_size=pretrain.image_size or proxy_size,
                proxy_size=proxy_size,
                run_dir=run_dir,
                data=load_data(run_dir, reading, proxy_size, every_image),
                board=board,
                num_decoders=request.cpus,
            )

        run_workers(group, pretrain_worker, make_job)
