"""Keys of section embed: the encoder, its embeddings, and the copies on which the proxy network trains."""

from dataclasses import dataclass

from elfs_ray.config.declaration import (
    POSITIVE,
    PROXY_SIDE,
    SIDE,
    Bounds,
    device_option,
    label_option,
    memory_option,
    option,
)
from elfs_ray.methods.encoders.processor import BF16, FP32, OPENVINO, TORCH

SELF_SUPERVISED = "self_supervised"
AUTO = "auto"


@dataclass
class EmbedConfig:
    """Embedding of every image, and its copy at the proxy network's resolution."""

    encoder: str = option(
        "timm/vit_base_patch16_224.dino",
        "auto (the best one whose weights are on this machine), pixels, efficientnet_lite0, swav_resnet50, "
        "torchvision/<model>, timm/<model>, file, or self_supervised (an "
        "encoder trained on the pool itself, see pretrain)",
    )
    weights: str | None = option(
        None,
        "file of the encoder's weights, in a bucket or at a path that every machine has; random:<seed> for an "
        "untrained network; null means the library's weights, and for self_supervised those that stage pretrain trains",
        is_path=True,
    )
    weights_sha256: str | None = option(None, "SHA-256 that the weights file must have; null checks none")
    image_size: int | None = option(
        None,
        "side of the square image that the encoder sees; null means the encoder's default",
        unit="pixels",
        bounds=SIDE,
    )
    resize: int | None = option(
        None,
        "short side to which an image is resized before its centre is cropped; null means image_size",
        unit="pixels",
        bounds=SIDE,
    )
    proxy_image_size: int = option(
        32, "short side of the copies on which the proxy network trains", unit="pixels", bounds=PROXY_SIDE
    )
    proxy_jpeg_quality: int = option(
        92, "JPEG quality of copies above 64 pixels (smaller copies are PNG)", bounds=Bounds(at_least=1, at_most=95)
    )
    max_image_pixels: int = option(100_000_000, "images with more pixels are rejected", unit="pixels", bounds=POSITIVE)
    block_images: int | None = option(
        None,
        "number of images in one file of the table; null means about 64 MiB of pixels",
        unit="images",
        bounds=POSITIVE,
    )
    batch_size: int = option(
        128, "images in one forward pass of the encoder; OpenVINO always takes 16", unit="images", bounds=POSITIVE
    )
    # Without a trace in the markers of runs by torch, which are those of earlier releases, too.
    runtime: str = option(
        AUTO,
        "what computes the encoder; auto means openvino on CPUs if it is installed (extra cpu-fast), else torch",
        choices=(AUTO, TORCH, OPENVINO),
        decides=lambda section: section.runtime != TORCH,
    )
    precision: str = option(
        AUTO,
        "precision of the encoder; auto means bf16 on GPUs, bf16 by openvino on CPUs that have it, and else fp32",
        choices=(AUTO, FP32, BF16),
        decides=lambda section: section.precision != AUTO,
    )
    device: str = device_option("encoders run")
    num_workers: int | str | None = option(
        None,
        "number of encoders, or a range such as 2-16: work begins with the fewest and uses up to the most as the "
        "cluster has room; null means one for each GPU, or one for each CPU",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None, "CPUs reserved for each encoder; null means 1", unit="CPUs", bounds=POSITIVE, decides=False
    )
    memory_gib: float | None = memory_option("encoder")
    label_selector: str | None = label_option("tasks and encoders", "label_selector of the whole run")

    @property
    def weights_file(self) -> str | None:
        """Return the file that `weights` names; None for an untrained network and for the library's weights."""
        is_random = self.weights is None or self.weights == "random" or self.weights.startswith("random:")
        return None if is_random else self.weights
