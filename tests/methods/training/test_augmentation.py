import numpy as np
import pytest
import torch
from torch.nn import functional

from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision
from elfs_ray.methods.training.augmentation import (
    _resize_as_products,
    _resize_one_by_one,
    _sample_boxes,
    center_crop,
    normalize,
    random_crop_flip,
    random_resized_crop_flip,
)

CROPS = [
    lambda images, ids, **kwargs: random_crop_flip(images, ids, **kwargs),
    lambda images, ids, **kwargs: random_resized_crop_flip(images, ids, size=12, **kwargs),
]


def photographs(num_images: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Return smooth uint8 images, all different."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (num_images, channels, 5, 5)).astype(np.float32))
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def windows(image: np.ndarray, padding: int, flip: bool) -> dict[tuple[int, int, bool], np.ndarray]:
    """Return every possible crop of an image, cut out of numpy's reflection padding."""
    h, w, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    shifts = range(2 * padding + 1)
    plain = {(y, x, False): padded[y : y + h, x : x + w] for y in shifts for x in shifts}
    mirrored = {(y, x, True): window[:, ::-1] for (y, x, _), window in plain.items()}
    return plain | mirrored if flip else plain


@pytest.mark.parametrize(("height", "width", "padding"), [(9, 13, 4), (8, 8, 7), (32, 32, 4), (5, 6, 0)])
def test_a_crop_is_a_window_of_the_reflected_image_or_its_mirror_image(height, width, padding):
    images = photographs(20, height, width)
    cropped = random_crop_flip(images, np.arange(20), seed=3, epoch=1, padding=padding).numpy()
    for image, crop in zip(images.numpy(), cropped, strict=True):
        assert any(np.array_equal(crop, window) for window in windows(image, padding, flip=True).values())


def test_every_shift_and_both_mirrorings_come_equally_often():
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8))
    num_samples = 18_000
    cropped = random_crop_flip(
        image.expand(num_samples, -1, -1, -1), np.arange(num_samples), seed=0, epoch=0, padding=1
    ).numpy()
    expected = windows(image[0].numpy(), 1, flip=True)
    counts = [(cropped == window).all(axis=(1, 2, 3)).sum() for window in expected.values()]
    assert sum(counts) == num_samples
    assert np.ptp(counts) < 250  # 1,000 each, with a standard deviation of 31


@pytest.mark.parametrize("crop", CROPS)
def test_augmentation_depends_on_seed_epoch_and_id_not_on_the_batch(crop):
    images, ids = photographs(30, 16, 16), np.arange(100, 130)
    together = crop(images, ids, seed=5, epoch=2)
    some = np.random.default_rng(2).permutation(30)[:7]
    assert torch.equal(crop(images[some], ids[some], seed=5, epoch=2), together[some])
    for other in (crop(images, ids, seed=6, epoch=2), crop(images, ids, seed=5, epoch=3)):
        assert (other != together).flatten(1).any(1).float().mean() > 0.8


@pytest.mark.parametrize("crop", CROPS)
def test_nothing_is_mirrored_without_flip(crop):
    ramp = torch.arange(0, 240, 15, dtype=torch.uint8).view(1, 1, 16, 1).expand(200, 16, 16, 3)
    ids = np.arange(200)
    rising = [
        (crop(ramp, ids, seed=0, epoch=0, flip=flip).int().diff(dim=2).sum((1, 2, 3)) > 0).sum().item()
        for flip in (False, True)
    ]
    assert rising[0] == 200
    assert 60 < rising[1] < 140


def test_a_resized_crop_of_the_whole_image_is_the_image():
    images = photographs(6, 12, 12)
    same = random_resized_crop_flip(
        images, np.arange(6), seed=0, epoch=0, size=12, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False
    )
    assert torch.equal(same, images)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 64), (100, 30)])
def test_boxes_are_distributed_as_those_of_torchvision(height, width):
    from torchvision.transforms import RandomResizedCrop

    num_samples, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = _sample_boxes(np.random.default_rng(0).random((num_samples, 23)), height, width, scale, ratio)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    reference = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(num_samples)])
    features = [np.column_stack([b[:, 2:], b[:, 2] * b[:, 3], b[:, 2] / b[:, 3]]) for b in (boxes, reference)]
    for ours, theirs in zip(features[0].T, features[1].T, strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 0.044  # passed by chance but once in 1,000
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    free = (height, width) - boxes[:, 2:]
    places = (boxes[:, :2] / np.maximum(free, 1))[(free > 5).all(axis=1)]
    np.testing.assert_allclose(places.mean(axis=0), 0.5, atol=0.03)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.union1d(a, b)
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_a_very_narrow_image_gives_its_largest_box_of_legal_ratio():
    narrow = photographs(20, 30, 2)
    cropped = random_resized_crop_flip(narrow, np.arange(20), seed=0, epoch=0, size=4, scale=(1.0, 1.0), flip=False)
    for i in range(20):
        boxes = np.array([[top, 0, 3, 2] for top in range(28)])
        legal = _resize_one_by_one(narrow[i].expand(28, -1, -1, -1), boxes, np.zeros(28, dtype=bool), 4)
        assert (legal == cropped[i]).flatten(1).all(1).any()


@pytest.mark.parametrize(("height", "width", "size"), [(64, 48, 24), (20, 30, 40), (33, 33, 33)])
def test_resizing_as_matrix_products_equals_torch_antialiased_resize(height, width, size):
    images = photographs(4, height, width)
    boxes = np.array([[0, 0, height, width], [3, 5, 11, 7], [1, 0, 1, 9], [2, 2, 16, 2]])
    flips = np.array([False, True, False, True])
    products = _resize_as_products(images, boxes, flips, size)
    for image, (top, left, h, w), flipped, product in zip(images, boxes, flips, products, strict=True):
        box = image[top : top + h, left : left + w].permute(2, 0, 1)[None].double()
        expected = functional.interpolate(box, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        expected = expected.flip(1) if flipped else expected
        assert (product.double() - expected).abs().max() <= 0.501
    one_by_one = _resize_one_by_one(images, boxes, flips, size)
    assert (one_by_one.int() - products.int()).abs().max() <= 1


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalizing_is_the_formula_in_the_requested_memory_format(channels_last):
    images = photographs(3, 7, 10)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    normalized = normalize(images, mean, std, channels_last=channels_last)
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalized.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert normalized.is_contiguous(memory_format=layout)


def test_a_centre_crop_is_the_middle_and_can_be_normalized():
    images = photographs(2, 9, 12)
    cropped = center_crop(images, 5)
    assert torch.equal(cropped, images[:, 2:7, 3:8])
    assert torch.equal(
        normalize(cropped, (0.5,) * 3, (0.2,) * 3), normalize(images, (0.5,) * 3, (0.2,) * 3)[:, :, 2:7, 3:8]
    )


def test_grey_images_and_empty_batches_keep_their_shape():
    grey = photographs(2, 10, 8, channels=1)
    assert random_crop_flip(grey, np.arange(2), seed=0, epoch=0).shape == (2, 10, 8, 1)
    assert random_resized_crop_flip(grey, np.arange(2), seed=0, epoch=0, size=6).shape == (2, 6, 6, 1)
    assert random_crop_flip(grey[:0], np.arange(0), seed=0, epoch=0).shape == (0, 10, 8, 1)


def test_what_does_not_fit_is_refused_with_the_numbers():
    images, ids = photographs(2, 8, 8), np.arange(2)
    with pytest.raises(ValueError, match="padding is 8"):
        random_crop_flip(images, ids, seed=0, epoch=0, padding=8)
    with pytest.raises(ValueError, match="3 sample ids"):
        random_crop_flip(images, np.arange(3), seed=0, epoch=0)
    with pytest.raises(ValueError, match="uint8"):
        random_crop_flip(images.float(), ids, seed=0, epoch=0)
    with pytest.raises(ValueError, match="scale"):
        random_resized_crop_flip(images, ids, seed=0, epoch=0, size=8, scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="8×8"):
        center_crop(images, 9)
    with pytest.raises(ValueError, match="3 channels"):
        normalize(images, (0.5,), (0.5,))


@pytest.mark.gpu
def test_a_gpu_crops_as_a_cpu_does():
    images, ids = photographs(64, 40, 40), np.arange(64)
    on_gpu = images.cuda()
    shifted = random_crop_flip(on_gpu, ids, seed=0, epoch=0)
    assert torch.equal(shifted.cpu(), random_crop_flip(images, ids, seed=0, epoch=0))
    resized = random_resized_crop_flip(on_gpu, ids, seed=0, epoch=0, size=32).cpu()
    expected = random_resized_crop_flip(images, ids, seed=0, epoch=0, size=32)
    assert (resized.int() - expected.int()).abs().max() <= 1
