"""Keys of section train: the proxy network and its training."""

from dataclasses import dataclass

from elfs_ray.config.declaration import (
    BATCH,
    POSITIVE,
    PROXY_SIDE,
    Bounds,
    compile_option,
    device_option,
    label_option,
    max_failures_option,
    memory_option,
    option,
    precision_option,
)

LINEAR = "linear"  # the one network that sees embeddings instead of images


@dataclass
class TrainConfig:
    """Training of the proxy network on pseudo-labels, during which its training dynamics are recorded."""

    network: str = option(
        "resnet18",
        "resnet18 (3x3 stem), resnet34, resnet50 or small_cnn; linear: a linear classifier of the embeddings, which "
        "ignores the keys about images below",
    )
    epochs: int = option(200, "number of passes over the pool", unit="epochs", bounds=POSITIVE)
    batch_size: int = option(256, "global batch, independent of the number of workers", unit="images", bounds=BATCH)
    micro_batch_size: int | None = option(
        None,
        "images in one forward pass of a worker, which accumulates gradients over its part of the batch; null means "
        "all at once",
        unit="images",
        bounds=Bounds(at_least=2),
    )
    lr: float = option(0.1, "SGD learning rate at the start", bounds=Bounds(above=0))
    scale_lr: bool = option(False, "treat lr as the rate for a batch of 256 and scale it with the batch size")
    min_lr: float = option(1e-4, "learning rate at the end of the cosine decay", bounds=Bounds(at_least=0))
    warmup_epochs: int = option(0, "epochs of linear warm-up", unit="epochs", bounds=Bounds(at_least=0))
    momentum: float = option(0.9, "momentum of SGD", bounds=Bounds(at_least=0, below=1))
    weight_decay: float = option(5e-4, "weight decay of SGD", bounds=Bounds(at_least=0))
    nesterov: bool = option(True, "use Nesterov momentum")
    augmentation: str = option(
        "crop_flip",
        "crop_flip: random crop of the reflection-padded image and random flip; crop: the same without the flip; "
        "resized_crop_flip: random resized crop and flip, as is usual for ImageNet; none",
        choices=("crop_flip", "crop", "resized_crop_flip", "none"),
    )
    crop_padding: int = option(
        4, "padding on each side before the random crop", unit="pixels", bounds=Bounds(at_least=0)
    )
    image_size: int | None = option(
        None,
        "side of the square image that the network sees; null means embed.proxy_image_size",
        unit="pixels",
        bounds=PROXY_SIDE,
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each channel, for pixels from 0 to 1")
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each channel, for pixels from 0 to 1")
    precision: str = precision_option()
    compile: bool = compile_option()
    reading: str = option(
        "auto",
        "memory: decode once, centre squares; streamed: decode in every epoch, random resized crops of the whole "
        "image; auto: streamed for resized_crop_flip and for pools larger than a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    device: str = device_option("training runs")
    num_workers: int | str | None = option(
        None,
        "number of data-parallel workers, or a range such as 1-4 to use as many as the cluster has room for; null "
        "means one for each GPU, or one on CPUs",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker, for threads and for processes that decode streamed images; null means 1 for a worker "
        "with a GPU and its images in memory, else an equal share of all CPUs",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = memory_option("worker")
    label_selector: str | None = label_option("training workers", "label_selector of the whole run")
    max_failures: int = max_failures_option("training")
