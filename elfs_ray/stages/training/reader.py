"""How proxy training and pretraining read proxy_images/ or embeddings/: the batches of an epoch, on the device.

Two readers, one interface. InMemoryReader, here, has a pool decoded once to centre squares, or for a linear proxy its
embeddings: one copy a node in the object store, or on each GPU. StreamedReader (streamed_reader.py) decodes in
every epoch what it reads in chunks.
Both visit samples in an order that is a function of the seed and the epoch, not of the number of workers; augmentation
is a function of (seed, epoch, sample_id); tails are padded with masked duplicates (methods/training/dynamics.py).
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import torch

from elfs_ray.config import TrainConfig
from elfs_ray.methods.training import augmentation
from elfs_ray.methods.training.dynamics import BatchPlan, epoch_order
from elfs_ray.pool.images import decode_proxy_image, describe_bad_copy
from elfs_ray.runtime.cluster import get_result
from elfs_ray.stages.training import planned_reading
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_GPU_SHARE = 0.3
READING_FILE = "reading.txt"
MAX_STORE_SHARE = 0.25  # of a node's object store; while they are joined, decoded images take twice their place


class Batch(NamedTuple):
    """What one worker puts through the network at once.

    sample_ids (m,) int64 and mask (m,) bool on the host; inputs, images (m, 3, s, s) or embeddings (m, d) float32, and
    targets (m,) int64 on the device. Rows outside the mask only fill the batch. Of images with several views, all first
    ones come first.
    """

    sample_ids: np.ndarray
    mask: np.ndarray
    inputs: torch.Tensor
    targets: torch.Tensor


class Reader(Protocol):
    """The source of a training worker's batches."""

    def steps(self, epoch: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (real rows of the global batch, this worker's micro-batches) for each step of an epoch."""


@dataclass(frozen=True)
class TrainingPool:
    """The samples to train on, by ascending id. Memory: 16 bytes a sample, once a node.

    sample_ids (n,) int64; targets (n,) int32, the pseudo-labels, or zeros where there are none; rows (n,) int32, where
    a sample is among the decoded images or embeddings, or its image in its chunk.
    """

    sample_ids: np.ndarray
    targets: np.ndarray
    rows: np.ndarray


class Augmentation(Protocol):
    """Turns uint8 images into what a network sees, in two steps: decoders crop, the device does the rest."""

    @property
    def seed(self) -> int:
        """Return the seed, which the order of samples follows from, too."""

    @property
    def takes_whole_images(self) -> bool:
        """Return whether crops are sampled from a whole photograph rather than around its centre square."""

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Crop (n, h, w, 3) uint8 to (n, ..., size, size, 3) uint8; n may be 0."""

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Turn the crops into (m, 3, size, size) float32, channels_last."""


@dataclass(frozen=True)
class Augmenter:
    """The augmentation of proxy training, as the config says."""

    config: TrainConfig
    seed: int
    size: int

    @property
    def takes_whole_images(self) -> bool:
        """Return whether crops are sampled from a whole photograph rather than around its centre square."""
        return self.config.augmentation == "resized_crop_flip"

    def __call__(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        return self.finish(self.crop(images, sample_ids, epoch), sample_ids, epoch)

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Crop (n, h, w, 3) uint8 to (n, size, size, 3) uint8, at random except for augmentation=none."""
        kind = self.config.augmentation
        if kind == "resized_crop_flip":
            return augmentation.random_resized_crop_flip(
                images, sample_ids, seed=self.seed, epoch=epoch, size=self.size
            )
        images = augmentation.center_crop(images, self.size)
        if kind == "none":
            return images
        return augmentation.random_crop_flip(
            images,
            sample_ids,
            seed=self.seed,
            epoch=epoch,
            padding=self.config.crop_padding,
            flip=kind == "crop_flip",
        )

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Normalise (n, s, s, 3) uint8 to (n, 3, s, s) float32, channels_last."""
        return augmentation.normalize(crops, self.config.mean, self.config.std)


@dataclass(frozen=True)
class EmbeddingsAsTheyAre:
    """The augmentation of embeddings: none; `crop` and `finish` take and give (n, d)."""

    seed: int
    takes_whole_images: bool = False

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Return the embeddings as they are."""
        return images

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Convert float16 to float32."""
        return crops.float()


class InMemoryReader:
    """Batches from decoded images (m, s, s, 3) uint8 or embeddings (m, d) float16, m >= n.

    They lie on the GPU where they take no more than 30% of it.

    Memory: the pool's, the images', and 8 bytes a sample for an epoch's order (24 while it is made).
    """

    def __init__(
        self, pool: TrainingPool, images: np.ndarray, augmenter: Augmentation, plan: BatchPlan, device: torch.device
    ):
        self._pool, self._augmenter, self._plan, self._device = pool, augmenter, plan, device
        self._shape = images.shape[1:]
        self._images = view_as_tensor(images.reshape(len(images), -1))
        if device.type == "cuda" and images.nbytes < MAX_GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._images = self._images.to(device)

    def steps(self, epoch: int) -> Iterator[tuple[int, list[Batch]]]:
        order = epoch_order(len(self._pool.sample_ids), self._augmenter.seed, epoch)
        for step in self._plan.steps():
            yield step.num_real, [self._batch(order[m.positions], m.mask, epoch) for m in step.micro_batches]

    def _batch(self, samples: np.ndarray, mask: np.ndarray, epoch: int) -> Batch:
        sample_ids = self._pool.sample_ids[samples]
        rows = torch.from_numpy(self._pool.rows[samples]).to(self._images.device, non_blocking=True)
        # index_select copies whole rows: 20 times as fast as numpy's indexing.
        images = self._images.index_select(0, rows).view(len(samples), *self._shape)
        images = images.to(self._device, non_blocking=True)
        targets = targets_on(self._device, self._pool.targets[samples])
        crops = self._augmenter.crop(images, sample_ids, epoch)
        return Batch(sample_ids, mask, self._augmenter.finish(crops, sample_ids, epoch), targets)


def targets_on(device: torch.device, targets: np.ndarray) -> torch.Tensor:
    """Move targets to a device as (m,) int64, without waiting for it."""
    tensor = torch.from_numpy(targets.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def view_as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over memory of the object store, which must not be written to."""
    with warnings.catch_warnings(action="ignore"):  # of just that
        return torch.from_numpy(array)


def read_pool(
    run_dir: RunDir, image_ids: np.ndarray, table: str = schema.PROXY_IMAGES
) -> tuple[TrainingPool, np.ndarray]:
    """Return the pseudo-labelled samples, and the positions of each in `image_ids` (m,) int64, ascending.

    Raises ValueError for samples without a row in `table`, and names some.
    """
    tables = run_dir.read_table(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR)
    parts = [(rows[schema.SAMPLE_ID].to_numpy(), rows[schema.PSEUDO_LABEL].to_numpy()) for rows in tables]
    sample_ids, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = np.searchsorted(image_ids, sample_ids)
    has_row = np.append(image_ids, -1)[rows] == sample_ids
    if not has_row.all():
        missing = sample_ids[~has_row]
        raise ValueError(
            f"{len(missing)} samples have no row in {table}/, sample_id {missing[:5].tolist()} among "
            "them: the same command with on_change=rerun makes it again"
        )
    return TrainingPool(sample_ids, targets, rows.astype(np.int32)), rows


def every_image(run_dir: RunDir, image_ids: np.ndarray) -> tuple[TrainingPool, np.ndarray]:
    """Return what `read_pool` does, for every image that has a copy, without targets."""
    positions = np.arange(len(image_ids))
    return TrainingPool(image_ids, np.zeros(len(image_ids), np.int32), positions.astype(np.int32)), positions


def choose_reading(
    run_dir: RunDir, stage: str, configured: str, num_samples: int, proxy_size: int, *, needs_whole_images: bool
) -> str:
    """Return memory or streamed. The order of samples depends on it, so a stage that was begun keeps its choice."""
    path = run_dir.path(stage, READING_FILE)
    if filesystem.exists(path):
        return filesystem.read_bytes(path).decode()
    reading = planned_reading(configured, needs_whole_images=needs_whole_images)
    if reading is None:
        stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
        fits = num_samples * 3 * proxy_size**2 <= MAX_STORE_SHARE * min(stores)
        reading = "memory" if fits else "streamed"
    filesystem.write_bytes(path, reading.encode())
    return reading


def load_images(run_dir: RunDir, size: int) -> tuple[np.ndarray, ray.ObjectRef]:
    """Decode proxy_images/ into the object store: (sample_ids, reference of an (n, size, size, 3) uint8 array).

    Driver memory: 8 bytes a sample. Object store: 3 · size² bytes a sample, twice while the parts are joined.
    Raises ValueError naming the first image that cannot be decoded.
    """
    return _load(_decode_file, [(path, size) for path in run_dir.table_files(schema.PROXY_IMAGES)])


def load_embeddings(run_dir: RunDir) -> list[ray.ObjectRef]:
    """Return references to a linear proxy's data for InMemoryReader: the pool, then embeddings (n, d) float16.

    Driver memory: 50 bytes a sample. Object store: 2 · d bytes a sample, twice while the parts are joined.
    """
    sample_ids, embeddings = _load(_read_embeddings, [(path,) for path in run_dir.table_files(schema.EMBEDDINGS)])
    return [ray.put(read_pool(run_dir, sample_ids, schema.EMBEDDINGS)[0]), embeddings]


def _load(read: Callable[..., tuple[np.ndarray, np.ndarray]], tasks: list[tuple]) -> tuple[np.ndarray, ray.ObjectRef]:
    """Return (sample_ids, reference of the rows) of all files; `read` returns ids and rows of one."""
    remote = ray.remote(num_cpus=1, num_returns=2)(read)
    parts: list[Any] = [remote.remote(*task) for task in tasks]
    sample_ids = np.concatenate([get_result(ids) for ids, _ in parts])
    joined = ray.remote(num_cpus=1)(_join).remote(*[rows for _, rows in parts])
    ray.wait([joined], fetch_local=False)
    return sample_ids, joined


def _read_embeddings(path: str) -> tuple[np.ndarray, np.ndarray]:
    rows = filesystem.read_table(path)
    return rows[schema.SAMPLE_ID].to_numpy(), schema.matrix_of(rows, schema.EMBEDDING)


def _decode_file(path: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    rows = filesystem.read_table(path)
    images = np.empty((rows.num_rows, size, size, 3), np.uint8)
    sample_ids = rows[schema.SAMPLE_ID].to_numpy()
    for position, data in enumerate(rows[schema.IMAGE]):
        try:
            images[position] = decode_proxy_image(data.as_py(), size)
        except Exception as error:
            raise ValueError(describe_bad_copy(sample_ids[position], path, error)) from error
    return sample_ids, images


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)
