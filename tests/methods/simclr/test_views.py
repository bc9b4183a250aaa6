"""Two views of an image: functions of (seed, epoch, sample_id, view), with the stated colours; grey pools stay grey."""

import dataclasses

import numpy as np
import pytest
import torch

from elfs_ray.methods.simclr.views import ViewSettings, _gaussian_weights, change_colors, two_crops
from tests.methods.training.test_augmentation import photographs

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EVERYTHING = ViewSettings(blur_probability=0.5)
STILL = ViewSettings(color_strength=0.0, grey_probability=0.0)
LUMA = np.array([0.299, 0.587, 0.114])


def views(images: torch.Tensor, ids: np.ndarray, settings: ViewSettings = EVERYTHING, seed: int = 5, epoch: int = 2):
    """Return both finished views, (2, n, 3, 12, 12)."""
    crops = two_crops(images, ids, settings, seed=seed, epoch=epoch, size=12)
    return torch.stack(
        [change_colors(crops[:, view], ids, settings, **PLAIN, seed=seed, epoch=epoch, view=view) for view in range(2)]
    )


def test_a_view_depends_on_seed_epoch_id_and_view_but_not_on_its_batch():
    images, ids = photographs(30, 16, 16), np.arange(100, 130)
    together = views(images, ids)
    some = np.random.default_rng(2).permutation(30)[:7]
    torch.testing.assert_close(views(images[some], ids[some]), together[:, some], rtol=0, atol=1e-6)
    assert torch.equal(views(images, ids), together)
    others = (together.flip(0), views(images, ids, seed=6), views(images, ids, epoch=3), views(images, ids + 1))
    for other in others:
        assert ((other - together).abs().flatten(2).amax(2) > 0.01).float().mean() > 0.9


def test_without_changes_a_view_is_its_crop():
    images, ids = photographs(9, 12, 12), np.arange(9)
    view = change_colors(images, ids, STILL, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), seed=0, epoch=0, view=1)
    expected = (images.numpy() / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(view.permute(0, 2, 3, 1), expected, atol=1e-5)
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_colours_follow_brightness_hue_saturation_and_contrast():
    """The factors are read off grey, red and white pixels; with them every pixel follows."""
    images = photographs(40, 12, 12) // 4 + 80  # far from black and white, so that nothing is clamped
    ids, settings = np.arange(40), ViewSettings(color_strength=0.3, grey_probability=0.3)
    view = change_colors(images, ids, settings, **PLAIN, seed=1, epoch=0, view=0).permute(0, 2, 3, 1).numpy()
    pixels = images.numpy() / 255
    to_yiq = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    changed = greys = 0
    for before, after in zip(pixels, view.astype(float), strict=True):
        (y, *chroma), (new_y, *new_chroma) = ((image @ to_yiq.T).reshape(-1, 3).T for image in (before, after))
        # Grey is scaled about the mean by brightness and contrast: it is a line in the old grey.
        slope, offset = np.polyfit(y, new_y, 1)
        np.testing.assert_allclose(new_y, slope * y + offset, atol=1e-4)
        mean_grey = y.mean()
        brightness = (new_y.mean()) / mean_grey
        assert 1 - 0.24 - 1e-3 <= brightness <= 1 + 0.24 + 1e-3
        assert 1 - 0.24 - 1e-3 <= slope / brightness <= 1 + 0.24 + 1e-3
        # Colour, as a complex number, is turned and scaled by one factor for all pixels.
        old, new = (chroma[0] + 1j * chroma[1]), (new_chroma[0] + 1j * new_chroma[1])
        factor = (new @ old.conj()) / (old @ old.conj()).real
        np.testing.assert_allclose(new, factor * old, atol=2e-3)
        if abs(factor) < 1e-3:
            greys += 1
        else:
            assert abs(np.angle(factor)) <= 2 * np.pi * 0.2 * 0.3 + 1e-2
        changed += not np.allclose(before, after, atol=1e-3)
    assert 5 <= greys <= 20 and 28 <= changed < 40


def test_a_grey_pool_stays_grey_and_its_views_differ():
    grey = photographs(20, 16, 16, channels=1).expand(-1, -1, -1, 3).contiguous()
    both = views(grey, np.arange(20))
    torch.testing.assert_close(both, both[:, :, :1].expand_as(both), rtol=0, atol=1e-5)
    assert ((both[0] - both[1]).abs().flatten(1).amax(1) > 0.01).all()


def test_shares_of_grey_and_blurred_views_equal_their_probabilities():
    images = photographs(1, 24, 24).expand(2000, -1, -1, -1)
    ids = np.arange(2000)
    grey = change_colors(
        images, ids, dataclasses.replace(STILL, grey_probability=0.2), **PLAIN, seed=0, epoch=0, view=0
    )
    share = ((grey[:, 0] - grey[:, 1]).abs().flatten(1).amax(1) < 1e-5).float().mean()
    assert share == pytest.approx(0.2, abs=0.04)
    noise = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8).expand(1000, -1, -1, -1)
    ids = np.arange(1000)
    sharp = change_colors(noise, ids, STILL, **PLAIN, seed=0, epoch=0, view=0)
    shares = []
    for probability in (0.5, 1.0):
        settings = dataclasses.replace(STILL, blur_probability=probability)
        blurred = change_colors(noise, ids, settings, **PLAIN, seed=0, epoch=0, view=0)
        shares.append(((blurred - sharp).abs().flatten(1).amax(1) > 1e-3).float().mean().item())
    assert shares[1] > 0.4  # the others are blurred so little that it does not show
    assert shares[0] / shares[1] == pytest.approx(0.5, abs=0.08)


def test_a_blur_is_a_normalised_gaussian_of_the_distance():
    weights = _gaussian_weights(torch.tensor([1.5]), 9)[0].double().numpy()
    distance = np.arange(9)[:, None] - np.arange(9)
    expected = np.exp(-(distance**2) / (2 * 1.5**2))
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), atol=1e-6)


def test_a_blur_keeps_orientation_and_the_mean_of_a_plain_image():
    gradient = torch.linspace(0, 255, 32).to(torch.uint8).view(1, 32, 1, 1).expand(50, 32, 20, 3).contiguous()
    blurred = change_colors(
        gradient, np.arange(50), dataclasses.replace(STILL, blur_probability=1.0), **PLAIN, seed=0, epoch=0, view=0
    )
    assert (blurred.diff(dim=2) > 0).all() and (blurred.diff(dim=3).abs() < 1e-4).all()


def test_no_image_gives_no_view():
    crops = two_crops(photographs(1, 8, 8)[:0], np.arange(0), EVERYTHING, seed=0, epoch=0, size=6)
    assert crops.shape == (0, 2, 6, 6, 3)
    assert change_colors(crops[:, 0], np.arange(0), EVERYTHING, **PLAIN, seed=0, epoch=0, view=0).shape == (0, 3, 6, 6)


@pytest.mark.gpu
def test_a_gpu_makes_the_views_that_a_cpu_does():
    images, ids = photographs(64, 40, 40), np.arange(64)
    crops = two_crops(images, ids, EVERYTHING, seed=0, epoch=0, size=32)
    on_gpu = change_colors(crops[:, 1].cuda(), ids, EVERYTHING, **PLAIN, seed=0, epoch=0, view=1).cpu()
    on_cpu = change_colors(crops[:, 1], ids, EVERYTHING, **PLAIN, seed=0, epoch=0, view=1)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3)
