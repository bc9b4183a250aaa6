"""Keys of section pretrain: an encoder trained on the pool itself."""

from dataclasses import dataclass

from elfs_ray.config.declaration import (
    POSITIVE,
    Bounds,
    compile_option,
    device_option,
    label_option,
    max_failures_option,
    memory_option,
    option,
    precision_option,
)


@dataclass
class PretrainConfig:
    """SimCLR pretraining of the encoder on the pool, for encoder=self_supervised; null means the profile's value."""

    profile: str = option(
        "gpu",
        "gpu: the published settings; cpu: half an hour on 2 cores; auto: by whether there are GPUs",
        choices=("auto", "gpu", "cpu"),
    )
    network: str | None = option(
        None,
        "architecture of the encoder: resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50 or small_cnn (gpu "
        "resnet18, cpu small_cnn)",
    )
    epochs: int | None = option(
        None,
        "number of passes over the pool (gpu 400, cpu 16); 0 leaves the network untrained",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    batch_size: int | None = option(
        None,
        "global batch; all its other images are negatives (gpu 512, cpu 256)",
        unit="images",
        bounds=Bounds(at_least=2),
    )
    lr: float | None = option(
        None,
        "SGD learning rate for a batch of 256, scaled with the batch size (gpu 0.12, cpu 0.3)",
        bounds=Bounds(above=0),
    )
    warmup_epochs: int | None = option(
        None,
        "epochs of linear warm-up before the cosine decay (gpu 10, cpu 1; at most a tenth of all epochs)",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    momentum: float | None = option(None, "Nesterov momentum of SGD (0.9)", bounds=Bounds(above=0, below=1))
    weight_decay: float | None = option(None, "weight decay of SGD (5e-4)", bounds=Bounds(at_least=0))
    temperature: float | None = option(
        None, "temperature of the softmax over similarities (gpu 0.5, cpu 0.2)", bounds=Bounds(above=0)
    )
    hidden_dim: int | None = option(None, "width of the projector's hidden layer (512)", bounds=POSITIVE)
    projection_dim: int | None = option(None, "width of the projection that the loss compares (128)", bounds=POSITIVE)
    min_crop_area: float | None = option(
        None,
        "smallest fraction of an image's area that a random crop shows (gpu 0.08, cpu 0.2)",
        bounds=Bounds(above=0, at_most=1),
    )
    color_strength: float | None = option(
        None,
        "strength of random changes to brightness, contrast, saturation and hue (0.5); 0 keeps the colours",
        bounds=Bounds(at_least=0, at_most=1),
    )
    grey_probability: float | None = option(
        None, "fraction of views that are turned grey (0.2)", bounds=Bounds(at_least=0, at_most=1)
    )
    blur_probability: float | None = option(
        None,
        "fraction of views that are blurred; null means 0 for images of up to 64 pixels, else 0.5",
        bounds=Bounds(at_least=0, at_most=1),
    )
    flip: bool | None = option(
        None, "flip every second view (true); use false where left and right differ, as in digits"
    )
    image_size: int | None = option(
        None,
        "side of the square image that the encoder sees; null means embed.proxy_image_size",
        unit="pixels",
        bounds=Bounds(at_least=8),
    )
    precision: str = precision_option()
    compile: bool = compile_option()
    reading: str = option(
        "auto",
        "memory: decode once, centre squares; streamed: decode in every epoch, crops of the whole image; auto: "
        "streamed for pools larger than a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    device: str = device_option("pretraining runs")
    num_workers: int | None = option(
        None,
        "number of data-parallel workers; null means one for each GPU; on CPUs there is always one",
        bounds=POSITIVE,
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker; null means 1 for a worker with a GPU and its images in memory, else an equal share of "
        "all CPUs",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = memory_option("worker")
    label_selector: str | None = label_option("pretraining workers", "label_selector of the whole run")
    max_failures: int = max_failures_option("pretraining")
