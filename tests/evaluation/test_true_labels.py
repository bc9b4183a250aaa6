"""The images that networks learn from: copies of the pool's, at the size of the evaluation."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from elfs_ray.config import ConfigError, EmbedConfig
from elfs_ray.evaluation.keys import check_image_size
from elfs_ray.evaluation.true_labels import load_images, load_test_images
from elfs_ray.pool.images import encode_png
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import png

SIZES = ((16, 16), (16, 24), (40, 16))
COPIES = [np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed, size in enumerate(SIZES)]


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    images = [encode_png(Image.fromarray(copy)) for copy in COPIES]
    table = pa.table({schema.SAMPLE_ID: pa.array(range(3), pa.int64()), schema.IMAGE: pa.array(images, pa.binary())})
    filesystem.write_table(run_dir.path(schema.PROXY_IMAGES, schema.range_file(0, 2)), table)
    return run_dir


def test_images_are_the_centre_squares_of_the_copies(run_dir):
    expected = [COPIES[2][12:28], COPIES[0], COPIES[1][:, 4:20]]
    assert np.array_equal(load_images(run_dir, np.array([2, 0, 1]), 16), expected)


def test_smaller_images_are_reduced_not_cropped(run_dir):
    (image,) = load_images(run_dir, np.array([0]), 8)
    reduced = Image.fromarray(COPIES[0]).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(image, np.asarray(reduced))


def test_test_images_have_the_size_of_the_training_images(tmp_path):
    (tmp_path / "cat").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    (tmp_path / "cat" / "1.png").write_bytes(png(pixels))
    embed = EmbedConfig(proxy_image_size=32)
    test = load_test_images(str(tmp_path), "auto", PoolColumns(None, "folder"), embed, ("cat", "dog"), 8)
    whole = load_test_images(str(tmp_path), "auto", PoolColumns(None, "folder"), embed, ("cat", "dog"), 32)
    reduced = Image.fromarray(whole.images[0]).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(test.images, [np.asarray(reduced)]) and test.labels.tolist() == [0]


def test_images_larger_than_the_copies_are_refused():
    check_image_size("image_size", 32, 32)
    with pytest.raises(ConfigError, match=r"image_size=64: the run keeps copies of 32 pixels, so give 32 at most"):
        check_image_size("image_size", 64, 32)
