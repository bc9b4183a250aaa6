"""embed.*: embeddings, and the copies that the proxy network trains on."""

from dataclasses import dataclass

from elfs_ray.config.declaration import POSITIVE, PROXY_SIDE, SIDE, Bounds, device_option, memory_option, option

SELF_SUPERVISED = "self_supervised"


@dataclass
class EmbedConfig:
    """Embeddings of every image, and its copy at the proxy network's resolution."""

    encoder: str = option(
        "timm/vit_base_patch16_224.dino",
        "pixels, efficientnet_lite0, swav_resnet50, torchvision/<model>, timm/<model>, file, or self_supervised: "
        "trained on the pool itself, see pretrain",
    )
    weights: str | None = option(
        None,
        "file of the encoder's weights, at a path that every machine has or in a bucket; random:<seed> for an "
        "untrained network; null takes the library's own, for self_supervised it trains them",
        is_path=True,
    )
    weights_sha256: str | None = option(None, "SHA-256 that the weights file must have")
    image_size: int | None = option(
        None, "side of the square that the encoder sees; null takes its own", unit="pixels", bounds=SIDE
    )
    resize: int | None = option(
        None,
        "short side before that square is cut from the centre; null takes image_size",
        unit="pixels",
        bounds=SIDE,
    )
    proxy_image_size: int = option(
        32, "short side of the copies that the proxy network trains on", unit="pixels", bounds=PROXY_SIDE
    )
    proxy_jpeg_quality: int = option(
        92, "JPEG quality of copies above 64 pixels (smaller ones are PNG)", bounds=Bounds(at_least=1, at_most=95)
    )
    max_image_pixels: int = option(100_000_000, "larger images are rejected", unit="pixels", bounds=POSITIVE)
    block_images: int | None = option(
        None, "images in one file of the table; null takes about 64 MiB of pixels", unit="images", bounds=POSITIVE
    )
    batch_size: int = option(128, "images in one pass of the encoder", unit="images", bounds=POSITIVE)
    device: str = device_option("encoders run")
    num_workers: int | str | None = option(
        None,
        "encoders at once, or a range such as 2-16: as many as there is room for, and work begins with the fewest; "
        "null takes one a GPU, or one a CPU",
        decides=False,
    )
    cpus_per_worker: int | None = option(
        None, "CPUs set aside for each encoder; null takes 1", unit="CPUs", bounds=POSITIVE, decides=False
    )
    memory_gib: float | None = memory_option("encoder")

    @property
    def weights_file(self) -> str | None:
        """The file that `weights` names; None where it asks for an untrained network, or for nothing."""
        is_random = self.weights is None or self.weights == "random" or self.weights.startswith("random:")
        return None if is_random else self.weights
