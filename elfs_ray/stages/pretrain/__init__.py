"""pretrain: train an encoder on the pool itself, without labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from elfs_ray.config import Config, check_pretraining_workers
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import Request
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.stages.training import check_network, needs_ray, planned_reading, request_training_workers
from elfs_ray.storage import schema

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class PretrainResult(Result):
    """The settings of the training, the path of the encoder's file, and the metrics of every epoch."""

    stage: ClassVar[str] = "pretrain"
    rows: int
    epochs: int
    workers: int
    reading: str
    settings: Mapping[str, Any]
    encoder: str
    history: Sequence[Mapping[str, float]]


def _describe(config: Config, num_samples: int) -> str:
    from elfs_ray.methods.simclr.training import simclr_settings

    chosen = simclr_settings(vars(config.pretrain), config.pretrain.image_size or config.embed.proxy_image_size)
    steps = math.ceil(num_samples / chosen.batch_size)
    return f"SimCLR, {chosen.network}, {count(chosen.epochs, 'epoch')} of {count(steps, 'step')}"


def request_pretraining_workers(config: Config, devices: "Devices", reading: str | None) -> Request:
    """Return the workers of pretraining; `reading` is None if it is not known yet."""
    pretrain = config.pretrain
    num_workers = pretrain.num_workers
    request = request_training_workers(devices, "pretrain", pretrain, num_workers=num_workers, reading=reading)
    check_pretraining_workers(request.device, request.most)
    return request


def _needs_ray(config: Config) -> bool:
    reading = planned_reading(config.pretrain.reading, needs_whole_images=False)
    return needs_ray(config.pretrain.num_workers, reading, config.embed.proxy_image_size)


def _requests(config: Config, devices: "Devices") -> list[Request]:
    reading = planned_reading(config.pretrain.reading, needs_whole_images=False)
    return [request_pretraining_workers(config, devices, reading)]


def _advice(config: Config, devices: "Devices") -> list[str]:
    pretrain = config.pretrain
    if pretrain.profile != "gpu" or pretrain.epochs is not None:
        return []
    if devices.resolve(pretrain.device, "pretrain.device") == "cuda":
        return []
    return ["will take days on CPUs with pretrain.profile=gpu: pretrain.profile=cpu takes half an hour on 2 cores"]


def _check(config: Config) -> None:
    if config.pretrain.network is not None:
        check_network("pretrain.network", config.pretrain.network)


STAGE = Stage(
    result=PretrainResult,
    section="pretrain",
    is_part_of=lambda config: config.pretrains,
    is_estimated=True,
    needs_ray=_needs_ray,
    inputs=lambda config: ("index", "copy"),
    files=lambda config: (f"pretrain/{schema.ENCODER_FILE}",),
    describe=_describe,
    requests=_requests,
    advice=_advice,
    check=_check,
    epoch_gauges={
        "epoch": "pretraining's last epoch, from 0",
        "loss": "mean loss of that epoch",
        "spread": "spread of the features of that epoch",
        "effective_rank": "effective rank of the features of that epoch",
        "images_per_s": "images a second of that epoch, over all workers",
        "data_wait_share": "share of that epoch spent waiting for images",
    },
)
