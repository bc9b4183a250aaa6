"""train: train the proxy network on pseudo-labels and record its dynamics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from elfs_ray.config import LINEAR, Config, proxy_workers
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import Request
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.stages.training import check_network, needs_ray, planned_reading, request_training_workers
from elfs_ray.storage import schema

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


FROM_EMBEDDINGS = "embeddings"  # the `reading` of a linear proxy, which sees no images


@dataclass(frozen=True)
class TrainResult(Result):
    """The number of samples recorded in each epoch, how images were read, and the metrics of every epoch."""

    stage: ClassVar[str] = "train"
    rows: int
    epochs: int
    workers: int
    reading: str
    history: Sequence[Mapping[str, float]]


def _describe(config: Config, num_samples: int) -> str:
    train = config.train
    proxy = f"{LINEAR}, on the embeddings" if train.network == LINEAR else train.network
    steps = count(math.ceil(num_samples / train.batch_size), "step")
    return f"{proxy}, {count(train.epochs, 'epoch')} of {steps}"


def needs_whole_images(config: Config) -> bool:
    """Return True if training crops whole photographs rather than centre squares; these must be streamed."""
    return config.train.augmentation == "resized_crop_flip"


def request_proxy_workers(config: Config, devices: "Devices", reading: str | None) -> Request:
    """Return the workers of proxy training; `reading` is None if it is not known yet."""
    num_workers = proxy_workers(config.train)
    return request_training_workers(devices, "train", config.train, num_workers=num_workers, reading=reading)


def _reading(config: Config) -> str | None:
    if config.train.network == LINEAR:
        return FROM_EMBEDDINGS
    return planned_reading(config.train.reading, needs_whole_images=needs_whole_images(config))


def _requests(config: Config, devices: "Devices") -> list[Request]:
    return [request_proxy_workers(config, devices, _reading(config))]


STAGE = Stage(
    result=TrainResult,
    section="train",
    is_part_of=lambda config: config.needs_dynamics,
    is_estimated=True,
    needs_ray=lambda config: needs_ray(config.train.num_workers, _reading(config), config.embed.proxy_image_size),
    inputs=lambda config: ("embed", "cluster"),
    tables=lambda config: (schema.DYNAMICS,),
    describe=_describe,
    requests=_requests,
    check=lambda config: check_network("train.network", config.train.network, LINEAR),
    epoch_gauges={
        "epoch": "proxy training's last epoch, from 0",
        "loss": "mean loss of that epoch",
        "accuracy": "share of pseudo-labels predicted in that epoch",
        "images_per_s": "images a second of that epoch, over all workers",
        "data_wait_share": "share of that epoch spent waiting for images",
        "recorder_share": "share of that epoch spent recording",
    },
)
