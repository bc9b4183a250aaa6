"""train.*: the proxy network."""

from dataclasses import dataclass

from elfs_ray.config.declaration import (
    BATCH,
    POSITIVE,
    PROXY_SIDE,
    Bounds,
    compile_option,
    device_option,
    max_failures_option,
    memory_option,
    option,
    precision_option,
)

LINEAR = "linear"  # the network that sees embeddings, not images


@dataclass
class TrainConfig:
    """The proxy network, trained on pseudo-labels while its training dynamics are recorded."""

    network: str = option(
        "resnet18",
        "resnet18 (3x3 stem), resnet34, resnet50, small_cnn; linear: a linear classifier of the embeddings, for which "
        "the keys of images below mean nothing",
    )
    epochs: int = option(200, "passes over the pool", unit="epochs", bounds=POSITIVE)
    batch_size: int = option(256, "global batch, whatever the number of workers", unit="images", bounds=BATCH)
    micro_batch_size: int | None = option(
        None,
        "images a worker takes at once, accumulated to its part of the batch; null takes all",
        unit="images",
        bounds=Bounds(at_least=2),
    )
    lr: float = option(0.1, "SGD learning rate at the start", bounds=Bounds(above=0))
    scale_lr: bool = option(False, "take lr as that of a batch of 256 and scale it with the batch")
    min_lr: float = option(1e-4, "learning rate at the end of the cosine", bounds=Bounds(at_least=0))
    warmup_epochs: int = option(0, "epochs of linear warm-up", unit="epochs", bounds=Bounds(at_least=0))
    momentum: float = option(0.9, "SGD momentum", bounds=Bounds(at_least=0, below=1))
    weight_decay: float = option(5e-4, "SGD weight decay", bounds=Bounds(at_least=0))
    nesterov: bool = option(True, "Nesterov momentum")
    augmentation: str = option(
        "crop_flip",
        "crop_flip: reflect-padded random crop and flip; crop: no flip; resized_crop_flip: as for ImageNet; none",
        choices=("crop_flip", "crop", "resized_crop_flip", "none"),
    )
    crop_padding: int = option(4, "padding before the random crop", unit="pixels", bounds=Bounds(at_least=0))
    image_size: int | None = option(
        None,
        "side of the square that the network sees; null takes embed.proxy_image_size",
        unit="pixels",
        bounds=PROXY_SIDE,
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each channel, of pixels scaled to 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each channel")
    precision: str = precision_option()
    compile: bool = compile_option()
    reading: str = option(
        "auto",
        "memory: decoded once, centre squares; streamed: decoded in every epoch, random resized crops of the whole "
        "photograph; auto: streamed for resized_crop_flip and for pools above a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    device: str = device_option("training runs")
    num_workers: int | str | None = option(
        None,
        "data-parallel workers, or a range such as 1-4 that follows what the cluster has; null takes one a GPU, or one "
        "CPU worker",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker: threads, and processes that decode streamed images; null takes 1 beside a GPU that has "
        "its images in memory, else an equal share of all",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = memory_option("worker")
    max_failures: int = max_failures_option("training")
