"""Make the pools of cpu_track.py, embedded: published datasets, a long-tailed one, and one with near-duplicates.

Each is up to 10,000 labelled images to choose from and up to 3,000 others to test on, read from a folder with mnist/,
fashion_mnist/, cifar10/ and tiny_imagenet/, each with train.parquet and test.parquet (image, label), and imagenette/
with WebDataset tars (jpg, cls). Embeddings are kept in files, as they take the most time.
"""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from elfs_ray.methods.encoders.encoder import load_encoder, to_unit_float16

NUM_POOL, NUM_TEST = 10_000, 3_000
TAIL_RATIO = 50  # the most frequent class of the long-tailed pool has so many times the images of the rarest
COPIED_SHARE = 0.3  # of the pool with near-duplicates
_BATCH = 64

Labelled = tuple[list[bytes], np.ndarray]


@dataclass(frozen=True)
class Source:
    """Images in a folder of the data, the encoder and image size that embed them, and what changes the pool."""

    folder: str
    encoder: str
    image_size: int
    change: Callable[[Labelled], Labelled] = lambda images: images


@dataclass(frozen=True)
class Pool:
    """Embeddings (n, d) float16 and classes (n,) int64 of the images to choose from, and of those to test on."""

    embeddings: np.ndarray
    classes: np.ndarray
    test_embeddings: np.ndarray
    test_classes: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(max(self.classes.max(), self.test_classes.max())) + 1


def long_tailed(pool: Labelled) -> Labelled:
    """Keep fewer and fewer images of the classes, down to a fiftieth of the first one's."""
    images, labels = pool
    num_classes = int(labels.max()) + 1
    most = np.bincount(labels).min()
    counts = np.rint(most * TAIL_RATIO ** (-np.arange(num_classes) / (num_classes - 1))).astype(int)
    kept = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)])
    kept.sort()
    return [images[row] for row in kept], labels[kept]


def with_near_duplicates(pool: Labelled) -> Labelled:
    """Replace 30% of the images by copies of others: JPEGs of quality 75, mirrored, or cropped to 90%."""
    images, labels = pool
    originals = np.random.default_rng(0).permutation(len(images))[: round((1 - COPIED_SHARE) * len(images))]
    copied = originals[: len(images) - len(originals)]
    copies = [_copy_of(images[row], number % 3) for number, row in enumerate(copied)]
    return [images[row] for row in originals] + copies, labels[np.concatenate([originals, copied])]


SOURCES = {
    "cifar10": Source("cifar10", "efficientnet_lite0", 96),
    "cifar10_tail": Source("cifar10", "efficientnet_lite0", 96, long_tailed),
    "fashion_mnist": Source("fashion_mnist", "efficientnet_lite0", 96),
    "mnist": Source("mnist", "pixels", 28),
    "cifar10_copies": Source("cifar10", "efficientnet_lite0", 96, with_near_duplicates),
    "imagenette": Source("imagenette", "efficientnet_lite0", 160),
    "tiny_imagenet": Source("tiny_imagenet", "efficientnet_lite0", 96),
}


def load_pool(name: str, data: Path, folder: Path) -> Pool:
    """Return a pool, embedded now or by an earlier run that kept the embeddings in `folder`."""
    path = folder / f"{name}.npz"
    if not path.exists():
        source = SOURCES[name]
        pool, test = read_set(data / source.folder)
        folder.mkdir(parents=True, exist_ok=True)
        save(path, embed_pool(source.change(pool), test, source.encoder, source.image_size))
    with np.load(path) as arrays:
        return Pool(**arrays)


def embed_pool(pool: Labelled, test: Labelled, encoder: str, size: int) -> Pool:
    """Embed the images of a pool and of its test set."""
    (images, labels), (test_images, test_labels) = pool, test
    embedded, test_embedded = embed(images, encoder, size), embed(test_images, encoder, size)
    return Pool(embedded, labels.astype(np.int64), test_embedded, test_labels.astype(np.int64))


def save(path: Path, pool: Pool) -> None:
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, **vars(pool))
    unfinished.replace(path)


def embed(images: list[bytes], encoder_name: str, size: int) -> np.ndarray:
    """Return unit embeddings (n, d) float16."""
    encoder = load_encoder(encoder_name, image_size=size)
    features = []
    for start in range(0, len(images), _BATCH):
        decoded = (Image.open(io.BytesIO(data)).convert("RGB") for data in images[start : start + _BATCH])
        batch = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in decoded])
        features.append(encoder.encode(batch))
    return to_unit_float16(np.concatenate(features))[0]


def read_set(folder: Path) -> tuple[Labelled, Labelled]:
    """Return the images and labels of the pool and of the test set."""
    if (folder / "train.parquet").exists():
        return read_parquet(folder / "train.parquet", NUM_POOL), read_parquet(folder / "test.parquet", NUM_TEST)
    images, labels = _read_tars(folder)
    order = np.random.default_rng(0).permutation(len(labels))
    num_pool = min(NUM_POOL, round(0.75 * len(labels)))
    pool, test = ([images[i] for i in rows] for rows in (order[:num_pool], order[num_pool:]))
    return (pool, labels[order[:num_pool]]), (test, labels[order[num_pool:]])


def read_parquet(path: Path, count: int) -> Labelled:
    """Return some images of a table and their labels."""
    table = pq.read_table(path, columns=["image", "label"])
    rows = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:count])
    images = table["image"].take(rows).to_pylist()
    return [image if isinstance(image, bytes) else image["bytes"] for image in images], table["label"].to_numpy()[rows]


def _read_tars(folder: Path) -> Labelled:
    images, labels = [], []
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    members[member.name] = content.read()
        for name in sorted(name for name in members if name.endswith(".jpg")):
            images.append(members[name])
            labels.append(int(members[name.removesuffix(".jpg") + ".cls"]))
    return images, np.array(labels)


def _copy_of(image: bytes, kind: int) -> bytes:
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    if kind == 1:
        opened = opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == 2:
        width, height = opened.size
        box = (round(0.05 * width), round(0.05 * height), round(0.95 * width), round(0.95 * height))
        opened = opened.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    opened.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
