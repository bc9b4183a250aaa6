"""Augmentation of whole batches on their device; every random number is a function of (seed, epoch, sample_id).

Images are uint8 `(n, h, w, c)`. The channels of a pixel are adjacent, so that a crop copies pixels, not bytes, and a
normalized batch is channels_last without a transposition, the layout in which convolutions are fastest on both CPU and
GPU. Random numbers come from numpy on the host, so sample ids stay there and nothing waits for a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from elfs_ray.methods.numeric.hashing import hash_uniform

_CROP_STREAM = 0x63726F70
_RESIZED_CROP_STREAM = 0x72726372
_NUM_BOX_TRIALS = 10  # as in torchvision's RandomResizedCrop


def random_crop_flip(
    images: torch.Tensor, sample_ids: np.ndarray, *, seed: int, epoch: int, padding: int = 4, flip: bool = True
) -> torch.Tensor:
    """Shift each image by up to `padding` pixels each way, reflected at the borders, and mirror every second one.

    images: (n, h, w, c) uint8, on any device. sample_ids: (n,) integers, on the host. flip: False for images whose
    meaning changes when mirrored, such as digits. Returns (n, h, w, c) uint8 on the device of `images`.
    Memory: 8nhw bytes of pixel indices. Raises ValueError where the padding does not fit the images.
    """
    n, h, w, c = _checked_shape(images, sample_ids)
    if not 0 <= padding < min(h, w):
        raise ValueError(
            f"padding is {padding} and the images are {h}×{w}; to reflect, it must be at least 0 and below {min(h, w)}"
        )
    draws = hash_uniform(seed, _CROP_STREAM, epoch, np.asarray(sample_ids)[:, None], np.arange(3))
    shifts = np.floor(draws[:, :2] * (2 * padding + 1)).astype(np.int64) - padding
    flips = (draws[:, 2:] < 0.5) & flip
    rows = _reflect(np.arange(h) + shifts[:, :1], h)
    columns = np.where(flips, np.arange(w)[::-1], np.arange(w))
    columns = _reflect(columns + shifts[:, 1:], w)

    # One gather of whole pixels shifts and mirrors the batch at once. Padding every image would copy it first.
    device = images.device
    row_starts = _to_device((np.arange(n)[:, None] * h + rows) * w, device)
    pixels = row_starts[:, :, None] + _to_device(columns, device)[:, None, :]
    return images.reshape(n * h * w, c).index_select(0, pixels.view(-1)).view(n, h, w, c)


def random_resized_crop_flip(
    images: torch.Tensor,
    sample_ids: np.ndarray,
    *,
    seed: int,
    epoch: int,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    view: int = 0,
) -> torch.Tensor:
    """Cut a random box from each image, resize it to `size` (bilinear, antialiased), and mirror every second one.

    Boxes are distributed as those of torchvision's RandomResizedCrop: `scale` is a range of area fractions, `ratio` one
    of width / height. images: (n, h, w, c) uint8, on any device; for images of different shapes call it with n = 1.
    sample_ids: (n,) integers, on the host. view: another view gets another box. Returns (n, size, size, c) uint8.
    Memory on a GPU: 4n(hwc + hc·size + (h + w)·size) bytes. Raises ValueError for ranges out of order.
    """
    _, h, w, _ = _checked_shape(images, sample_ids)
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise ValueError(
            f"scale is {scale} and ratio {ratio}; they must be (low, high) with 0 < low <= high, and scale at most 1"
        )
    draws = hash_uniform(
        seed, _RESIZED_CROP_STREAM + view, epoch, np.asarray(sample_ids)[:, None], np.arange(2 * _NUM_BOX_TRIALS + 3)
    )
    boxes = _sample_boxes(draws, h, w, scale, ratio)
    flips = (draws[:, -1] < 0.5) & flip
    if images.device.type == "cpu":
        return _resize_one_by_one(images, boxes, flips, size)
    return _resize_as_products(images, boxes, flips, size)


def center_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return the central `size` × `size` window of images (n, h, w, c), as a view.

    Raises ValueError for images that are smaller.
    """
    h, w = images.shape[1:3]
    if min(h, w) < size:
        raise ValueError(f"images are {h}×{w}, too small for a centre crop of {size}; resize them first")
    top, left = (h - size) // 2, (w - size) // 2
    return images[:, top : top + size, left : left + size]


def normalize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = True
) -> torch.Tensor:
    """Return (images / 255 − mean) / std, with a value of `mean` and `std` for each channel.

    images: (n, h, w, c) uint8. Returns (n, c, h, w) float32 on the same device, in channels_last memory or contiguous.
    """
    n, h, w, c = images.shape
    if len(mean) != c or len(std) != c or min(std) <= 0:
        raise ValueError(
            f"images have {c} channels, but mean is {mean} and std {std}; they must have a value for each channel, and "
            "std must be positive"
        )
    factor, offset = _affine_row(tuple(mean), tuple(std), w, images.device)
    normalized = torch.addcmul(offset, images.reshape(n, h, w * c), factor).view(n, h, w, c).permute(0, 3, 1, 2)
    return normalized if channels_last else normalized.contiguous()


@lru_cache(maxsize=16)
def _affine_row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor and offset for a whole row of pixels, (width · channels,) float32 each."""
    # Broadcasting over three channels would make them the inner loop, which takes seven times as long as over a row.
    factor = 1 / (255 * np.asarray(std, dtype=np.float64))
    offset = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
    tiled = np.tile(np.stack([factor, offset]), width).astype(np.float32)
    on_device = torch.from_numpy(tiled).to(device)
    return on_device[0], on_device[1]


def _checked_shape(images: torch.Tensor, sample_ids: np.ndarray) -> torch.Size:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be uint8 of shape (n, h, w, c)")
    if len(sample_ids) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(sample_ids)} sample ids; give one id for each image")
    return images.shape


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Mirror positions in (−size, 2·size − 1) into [0, size) about both ends, which are not repeated."""
    return size - 1 - np.abs(size - 1 - np.abs(positions))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # A copy from pageable memory makes the host wait for the GPU.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _sample_boxes(
    draws: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Return boxes (n, 4) int64 of top, left, height, width: for each row the first trial that fits the image.

    Where no trial fits, the box is the largest of a legal ratio. torchvision centres it; here it lies anywhere.
    """
    area_draws, ratio_draws = draws[:, :_NUM_BOX_TRIALS], draws[:, _NUM_BOX_TRIALS : 2 * _NUM_BOX_TRIALS]
    # All trials of all rows at once: torchvision's loop over trials would be a loop over images in Python.
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * area_draws)
    ratios = (
        ratio[0] * (ratio[1] / ratio[0]) ** ratio_draws
    )  # uniform in the logarithm, so that 3:4 is as likely as 4:3
    trials = np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2))).astype(np.int64)
    fits = (trials.min(axis=2) > 0) & (trials[:, :, 0] <= height) & (trials[:, :, 1] <= width)
    largest = (min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1]))))
    shapes = np.where(fits.any(axis=1)[:, None], trials[np.arange(len(draws)), fits.argmax(axis=1)], largest)
    corners = np.floor(draws[:, -3:-1] * ((height, width) - shapes + 1)).astype(np.int64)
    return np.concatenate([corners, shapes], axis=1)


def _resize_one_by_one(images: torch.Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> torch.Tensor:
    """Resize boxes to (n, size, size, c), one image at a time, as is fastest on a CPU."""
    # torch's resize of uint8 is vectorized within an image: ten times faster than any batched form.
    n, _, _, c = images.shape
    resized = images.new_empty(n, size, size, c)
    channels_first = images.permute(0, 3, 1, 2)
    for i, ((top, left, height, width), flipped) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        box = channels_first[i : i + 1, :, top : top + height, left : left + width]
        image = functional.interpolate(box, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)[0]
        resized[i] = image.flip(1) if flipped else image
    return resized


def _resize_as_products(images: torch.Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> torch.Tensor:
    """Resize boxes to (n, size, size, c) by two batched matrix products, as is fastest on a GPU."""
    # Boxes differ in size, so that torch's resize would be a kernel launch per image. A bilinear resize is linear and
    # separable: a product with weights for the rows and one for the columns, in a handful of kernels per batch.
    n, h, w, c = images.shape
    device = images.device
    tops, lefts, heights, widths = _to_device(boxes, device).to(torch.float32).unbind(1)
    row_weights = _triangle_weights(tops, heights, h, size)
    column_weights = _triangle_weights(lefts, widths, w, size)
    column_weights = torch.where(_to_device(flips, device)[:, None, None], column_weights.flip(1), column_weights)
    with torch.autocast(device.type, enabled=False):  # bfloat16 has too few bits for weighted sums of pixels
        lines = images.permute(0, 1, 3, 2).to(torch.float32).reshape(n, h * c, w)
        columns_done = torch.bmm(lines, column_weights.transpose(1, 2)).view(n, h, c * size)
        resized = torch.bmm(row_weights, columns_done).view(n, size, c, size)
    return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 1, 3, 2).contiguous()


def _triangle_weights(starts: torch.Tensor, lengths: torch.Tensor, num_pixels: int, size: int) -> torch.Tensor:
    """Return the weights (n, size, num_pixels) of an antialiased bilinear resize of each [start, start + length)."""
    scales = lengths[:, None] / size
    centers = starts[:, None] + (torch.arange(size, device=starts.device) + 0.5) * scales
    pixels = torch.arange(num_pixels, device=starts.device) + 0.5
    # Antialiasing: when shrinking, the triangle is as wide as the output pixel; when enlarging, as the input pixel.
    weights = 1 - (pixels - centers[:, :, None]).abs() / scales.clamp(min=1)[:, :, None]
    inside = (pixels > starts[:, None]) & (pixels < (starts + lengths)[:, None])
    weights = weights.clamp_(min=0) * inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)
