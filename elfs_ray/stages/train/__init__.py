"""train: train the proxy network on pseudo-labels and record its dynamics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from elfs_ray.config import LINEAR, Config, proxy_workers
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import Request, request_workers
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.stages.training import check_network
from elfs_ray.storage import schema

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices


@dataclass(frozen=True)
class TrainResult(Result):
    """The samples recorded in each epoch, how the images were read, and the metrics of every epoch."""

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


def _requests(config: Config, devices: "Devices") -> list[Request]:
    train = config.train
    request = request_workers(
        devices,
        "train",
        "worker",
        device=train.device,
        num_workers=proxy_workers(train),
        usual=1,
        cpus=train.cpus_per_worker or 1,
        memory_gib=train.memory_gib,
    )
    return [request]


STAGE = Stage(
    result=TrainResult,
    section="train",
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
