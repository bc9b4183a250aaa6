"""pretrain.*: an encoder trained on the pool itself."""

from dataclasses import dataclass

from elfs_ray.config.declaration import (
    POSITIVE,
    Bounds,
    compile_option,
    device_option,
    max_failures_option,
    memory_option,
    option,
    precision_option,
)


@dataclass
class PretrainConfig:
    """An encoder trained on the pool itself by SimCLR, with encoder=self_supervised; null takes the profile's value."""

    profile: str = option("gpu", "gpu: published settings; cpu: half an hour on 2 cores", choices=("gpu", "cpu"))
    network: str | None = option(
        None,
        "the encoder: resnet18 (3x3 stem), resnet18_imagenet, resnet34, resnet50, small_cnn (gpu resnet18, cpu "
        "small_cnn)",
    )
    epochs: int | None = option(
        None,
        "passes over the pool (gpu 400, cpu 16); 0 leaves the network untrained",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    batch_size: int | None = option(
        None, "global batch, all of it negatives (gpu 512, cpu 256)", unit="images", bounds=Bounds(at_least=2)
    )
    lr: float | None = option(
        None, "SGD learning rate for a batch of 256, scaled with the batch (gpu 0.12, cpu 0.3)", bounds=Bounds(above=0)
    )
    warmup_epochs: int | None = option(
        None,
        "epochs of linear warm-up before the cosine (gpu 10, cpu 1, both at most a tenth of all)",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    momentum: float | None = option(None, "SGD momentum, Nesterov's (0.9)", bounds=Bounds(above=0, below=1))
    weight_decay: float | None = option(None, "SGD weight decay (5e-4)", bounds=Bounds(at_least=0))
    temperature: float | None = option(
        None, "of the softmax over similarities (gpu 0.5, cpu 0.2)", bounds=Bounds(above=0)
    )
    hidden_dim: int | None = option(None, "width of the projector's hidden layer (512)", bounds=POSITIVE)
    projection_dim: int | None = option(None, "width of what the loss compares (128)", bounds=POSITIVE)
    min_crop_area: float | None = option(
        None, "smallest share of an image that a view shows (gpu 0.08, cpu 0.2)", bounds=Bounds(above=0, at_most=1)
    )
    color_strength: float | None = option(
        None, "of brightness, contrast, saturation and hue (0.5); 0 keeps colours", bounds=Bounds(at_least=0, at_most=1)
    )
    grey_probability: float | None = option(
        None, "share of views without colour (0.2)", bounds=Bounds(at_least=0, at_most=1)
    )
    blur_probability: float | None = option(
        None, "share of blurred views; null takes 0 up to 64 pixels, else 0.5", bounds=Bounds(at_least=0, at_most=1)
    )
    flip: bool | None = option(None, "mirror every second view (true); false for what has a handedness, as digits")
    image_size: int | None = option(
        None,
        "side of the square that the encoder sees; null takes embed.proxy_image_size",
        unit="pixels",
        bounds=Bounds(at_least=8),
    )
    precision: str = precision_option()
    compile: bool = compile_option()
    reading: str = option(
        "auto",
        "memory: decoded once, centre squares; streamed: decoded in every epoch, crops of the whole photograph; auto: "
        "streamed for pools above a quarter of a node's object store",
        choices=("auto", "memory", "streamed"),
    )
    device: str = device_option("pretraining runs")
    num_workers: int | None = option(
        None, "data-parallel workers; null takes one a GPU; on CPUs there is one", bounds=POSITIVE, decides=False
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of each worker; null takes 1 beside a GPU that has its images in memory, else an equal share of all",
        unit="CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    memory_gib: float | None = memory_option("worker")
    max_failures: int = max_failures_option("pretraining")
