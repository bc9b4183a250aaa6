"""Two random views of every image for contrastive learning, in batches on their device (SimCLR, appendix A).

Every random number is a function of (seed, epoch, sample_id, view). Colours change by one matrix and one offset per
image: brightness, hue, saturation, contrast and grey are all affine in the pixel, so one product replaces five passes.
Unlike torchvision, which shuffles these and clamps after each, the order is fixed and the result is clamped once. Hue
rotates about the grey axis of YIQ, which is close to a rotation in HSV and needs no case distinctions. On a greyscale
image hue, saturation and grey change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.methods.training.augmentation import random_resized_crop_flip

NUM_VIEWS = 2
_COLOR_STREAM = 0x636F6C72
_BLUR_STREAM = 0x626C7572
_BLUR_SIGMA = (0.1, 2.0)  # pixels, in an image of 224 (SimCLR, appendix A); scales with the image
_BLUR_REFERENCE = 224
_JITTER_PROBABILITY = 0.8
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass(frozen=True)
class ViewSettings:
    """How much views differ from their image; the defaults are SimCLR's for CIFAR-10 (appendix B.9).

    color_strength s changes brightness, contrast and saturation by factors in 1 ± 0.8 s and rotates hue by up to 0.2 s
    of a circle, in 80% of views. grey_probability and blur_probability are the shares of grey and blurred views.
    """

    min_crop_area: float = 0.08
    color_strength: float = 0.5
    grey_probability: float = 0.2
    blur_probability: float = 0.0
    flip: bool = True


def two_crops(
    images: torch.Tensor, sample_ids: np.ndarray, settings: ViewSettings, *, seed: int, epoch: int, size: int
) -> torch.Tensor:
    """Cut two random resized crops of each image: (n, h, w, c) uint8 to (n, 2, size, size, c) uint8."""
    crops = [
        random_resized_crop_flip(
            images,
            sample_ids,
            seed=seed,
            epoch=epoch,
            size=size,
            scale=(settings.min_crop_area, 1.0),
            flip=settings.flip,
            view=view,
        )
        for view in range(NUM_VIEWS)
    ]
    return torch.stack(crops, dim=1)


def change_colors(
    images: torch.Tensor,
    sample_ids: np.ndarray,
    settings: ViewSettings,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    seed: int,
    epoch: int,
    view: int,
) -> torch.Tensor:
    """Change one view's colours, blur some images, and normalize to (pixel / 255 − mean) / std.

    images (n, h, w, 3) uint8. Returns (n, 3, h, w) float32 on the same device, channels_last.
    Memory: 24 bytes per pixel and, where views are blurred, 8nh².
    """
    n, h, w, _ = images.shape
    device = images.device
    draws = hash_uniform(seed, _COLOR_STREAM, epoch, view, np.asarray(sample_ids)[:, None], np.arange(6))
    matrices, contrasts = _color_matrices(draws, settings)
    pixels = images.reshape(n, h * w, 3).float().div_(255)
    # Contrast scales about the image's mean grey, after the change of brightness: `contrasts` includes that factor.
    offsets = (pixels.mean(1) @ _on(_LUMA, device))[:, None] * _on(contrasts, device)[:, None]
    matrix = _on(matrices, device).transpose(1, 2)
    pixels = torch.baddbmm(offsets[:, :, None].expand(n, 1, 3), pixels, matrix).clamp_(0, 1)
    if settings.blur_probability > 0:
        pixels = _blur(pixels.view(n, h, w, 3), sample_ids, settings, seed=seed, epoch=epoch, view=view)
    factor, offset = _affine(tuple(mean), tuple(std), device)
    return torch.addcmul(offset, pixels.reshape(n, h * w, 3), factor).view(n, h, w, 3).permute(0, 3, 1, 2)


def _color_matrices(draws: np.ndarray, settings: ViewSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return colour matrices (n, 3, 3) and the share (n,) of the mean grey to add, from uniform draws (n, 6)."""
    jittered = draws[:, 4] < _JITTER_PROBABILITY
    spans = np.where(jittered[:, None], settings.color_strength * (2 * draws[:, :4] - 1), 0.0)
    brightness, contrast, saturation = (1 + 0.8 * spans[:, :3]).T
    angles = 2 * np.pi * 0.2 * spans[:, 3]
    turns = np.zeros((len(draws), 3, 3))  # rotations of I and Q; Y, the grey, stays
    turns[:, 0, 0] = 1
    turns[:, 1, 1] = turns[:, 2, 2] = np.cos(angles)
    turns[:, 2, 1] = np.sin(angles)
    turns[:, 1, 2] = -turns[:, 2, 1]
    to_grey = np.tile(_LUMA, (3, 1))
    saturation = np.where(draws[:, 5] < settings.grey_probability, 0.0, saturation)
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation[:, None, None]) * to_grey
    matrices = saturate @ np.linalg.inv(_TO_YIQ) @ turns @ _TO_YIQ * (brightness * contrast)[:, None, None]
    return matrices, brightness * (1 - contrast)


def _blur(
    images: torch.Tensor, sample_ids: np.ndarray, settings: ViewSettings, *, seed: int, epoch: int, view: int
) -> torch.Tensor:
    """Blur some of the images (n, h, w, 3) float32 by a Gaussian of each image's width."""
    # A Gaussian is separable: one batched product along rows and one along columns, with another width per image, which
    # a convolution could not have.
    n, h, w, c = images.shape
    draws = hash_uniform(seed, _BLUR_STREAM, epoch, view, np.asarray(sample_ids)[:, None], np.arange(2))
    sigmas = (_BLUR_SIGMA[0] + (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]) * draws[:, 0]) * min(h, w) / _BLUR_REFERENCE
    # Images that stay sharp get a width at which each pixel's weight is all its own, so that the batch stays whole.
    sigmas = np.where(draws[:, 1] < settings.blur_probability, sigmas, 1e-3)
    on_device = _on(sigmas, images.device)
    rows_done = torch.bmm(_gaussian_weights(on_device, h), images.view(n, h, w * c)).view(n, h, w, c)
    columns = rows_done.permute(0, 2, 1, 3).reshape(n, w, h * c)
    return torch.bmm(_gaussian_weights(on_device, w), columns).view(n, w, h, c).permute(0, 2, 1, 3)


def _gaussian_weights(sigmas: torch.Tensor, length: int) -> torch.Tensor:
    """Return (n, length, length) weights of each pixel in each blurred one; rows sum to 1."""
    positions = torch.arange(length, device=sigmas.device, dtype=torch.float32)
    distances = (positions[:, None] - positions).square()
    # The softmax of -x² / 2σ² is a Gaussian that is normalized over the pixels there are, at the borders as well.
    return torch.softmax(-distances / (2 * sigmas.square())[:, None, None], dim=2)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    factor = 1 / np.asarray(std)
    return _on(factor, device), _on(-np.asarray(mean) * factor, device)


def _on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array.astype(np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
