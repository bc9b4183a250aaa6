"""Read the batches of an epoch from proxy_images/ or embeddings/ onto the device.

Two readers share one interface. InMemoryReader, in this file, holds the whole pool, decoded once to centre squares, or
the embeddings for a linear proxy: one copy a node in the object store, or one on each GPU. StreamedReader
(streamed_reader.py) reads and decodes the images anew in every epoch.

Both visit samples in an order that depends on the seed and the epoch, not on the number of workers. Augmentation is a
function of (seed, epoch, sample_id). The last batch is padded with masked duplicates (methods/training/dynamics.py).
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
from elfs_ray.runtime.tasks import get_result, put, start_task
from elfs_ray.stages.training import planned_reading
from elfs_ray.stages.training.shared_data import share
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_GPU_SHARE = 0.3  # of the free GPU memory; the rest is for the network and its activations
READING_FILE = "reading.txt"
MAX_STORE_SHARE = 0.25  # of a node's object store: images take twice their size while they are joined


class Batch(NamedTuple):
    """One forward pass of one worker.

    On the host: sample_ids (m,) int64 and mask (m,) bool, False for rows that only pad the batch. On the device:
    inputs, images (m, 3, s, s) or embeddings (m, d) float32, and targets (m,) int64. If images have several views,
    inputs holds all first views, then all second views.
    """

    sample_ids: np.ndarray
    mask: np.ndarray
    inputs: torch.Tensor
    targets: torch.Tensor


class Reader(Protocol):
    """The source of one worker's batches."""

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (rows of the global batch without padding, this worker's micro-batches) for each step of an epoch.

        first: the step to begin with, where an epoch is resumed.
        """


@dataclass(frozen=True)
class TrainingPool:
    """The samples to train on, by ascending id. Memory: 16 bytes a sample, once a node.

    sample_ids (n,) int64; targets (n,) int32, the pseudo-labels, or zeros if there are none; rows (n,) int32, the
    sample's position among the decoded images or embeddings or, if images are streamed, in its chunk.
    """

    sample_ids: np.ndarray
    targets: np.ndarray
    rows: np.ndarray


class Augmentation(Protocol):
    """Turns uint8 images into a network's input in two steps: decoders crop, the device does the rest."""

    @property
    def seed(self) -> int:
        """Return the seed, which also decides the order of samples."""

    @property
    def takes_whole_images(self) -> bool:
        """Return whether crops are sampled from a whole photograph rather than around its centre square."""

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Crop (n, h, w, 3) uint8 to (n, ..., size, size, 3) uint8; n may be 0."""

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Turn the crops into (m, 3, size, size) float32, channels_last."""


@dataclass(frozen=True)
class Augmenter:
    """The augmentation of proxy training that the config sets."""

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
class UnchangedEmbeddings:
    """No augmentation, for embeddings: `crop` and `finish` take and return (n, d)."""

    seed: int
    takes_whole_images: bool = False

    def crop(self, images: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Return the embeddings unchanged."""
        return images

    def finish(self, crops: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Convert float16 to float32."""
        return crops.float()


class InMemoryReader:
    """Reads batches from decoded images (m, s, s, 3) uint8 or embeddings (m, d) float16, for n <= m samples.

    They are copied to the GPU if they take less than 30% of its free memory.

    Memory: the pool and the images, and 8 bytes a sample for an epoch's order (24 while it is made).
    """

    def __init__(
        self, pool: TrainingPool, images: np.ndarray, augmenter: Augmentation, plan: BatchPlan, device: torch.device
    ):
        self._pool, self._augmenter, self._plan, self._device = pool, augmenter, plan, device
        self._shape = images.shape[1:]
        self._images = view_as_tensor(images.reshape(len(images), -1))
        if device.type == "cuda" and images.nbytes < MAX_GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._images = self._images.to(device)

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        order = epoch_order(len(self._pool.sample_ids), self._augmenter.seed, epoch)
        for step in self._plan.steps(first):
            yield step.num_real, [self._batch(order[m.positions], m.mask, epoch) for m in step.micro_batches]

    def _batch(self, samples: np.ndarray, mask: np.ndarray, epoch: int) -> Batch:
        sample_ids = self._pool.sample_ids[samples]
        rows = torch.from_numpy(self._pool.rows[samples]).to(self._images.device, non_blocking=True)
        # index_select copies whole rows of a matrix, 20 times as fast as numpy's indexing.
        images = self._images.index_select(0, rows).view(len(samples), *self._shape)
        images = images.to(self._device, non_blocking=True)
        targets = targets_on(self._device, self._pool.targets[samples])
        crops = self._augmenter.crop(images, sample_ids, epoch)
        return Batch(sample_ids, mask, self._augmenter.finish(crops, sample_ids, epoch), targets)


def targets_on(device: torch.device, targets: np.ndarray) -> torch.Tensor:
    """Return targets on a device as (m,) int64, without waiting for the copy."""
    # Only a copy from pinned memory runs beside the host.
    tensor = torch.from_numpy(targets.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def view_as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares an array of the object store. It must not be written to."""
    with warnings.catch_warnings(action="ignore"):  # torch warns that the array is read-only
        return torch.from_numpy(array)


def read_pool(
    run_dir: RunDir, image_ids: np.ndarray, table: str = schema.PROXY_IMAGES
) -> tuple[TrainingPool, np.ndarray]:
    """Return the samples that have a pseudo-label, and their positions in `image_ids` (m,) int64, which ascend.

    Raises ValueError, naming some, for samples without a row in `table`.
    """
    tables = run_dir.read_table(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR)
    parts = [(rows[schema.SAMPLE_ID].to_numpy(), rows[schema.PSEUDO_LABEL].to_numpy()) for rows in tables]
    sample_ids, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = np.searchsorted(image_ids, sample_ids)
    has_row = np.append(image_ids, -1)[rows] == sample_ids  # -1: an id above the last one gets the position m
    if not has_row.all():
        missing = sample_ids[~has_row]
        raise ValueError(
            f"{len(missing)} samples have no row in {table}/, such as sample_id {missing[:5].tolist()}: run the same "
            "command with on_change=rerun to write the table again"
        )
    return TrainingPool(sample_ids, targets, rows.astype(np.int32)), rows


def every_image(run_dir: RunDir, image_ids: np.ndarray) -> tuple[TrainingPool, np.ndarray]:
    """Return the same as `read_pool`, for all images that have a copy and without targets."""
    positions = np.arange(len(image_ids))
    return TrainingPool(image_ids, np.zeros(len(image_ids), np.int32), positions.astype(np.int32)), positions


def choose_reading(
    run_dir: RunDir, stage: str, configured: str, num_samples: int, proxy_size: int, *, needs_whole_images: bool
) -> str:
    """Return memory or streamed, as the config says or as the pool's size decides."""

    def choose() -> str:
        reading = planned_reading(configured, needs_whole_images=needs_whole_images)
        if reading is not None:
            return reading
        if not ray.is_initialized():
            return "memory"  # a run that trains in this process has few images
        stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
        fits = num_samples * 3 * proxy_size**2 <= MAX_STORE_SHARE * min(stores)
        return "memory" if fits else "streamed"

    # The order of samples differs between the two, and object stores between clusters.
    return run_dir.first_choice(stage, READING_FILE, choose=choose)


def load_images(run_dir: RunDir, size: int) -> tuple[np.ndarray, Any]:
    """Decode proxy_images/ into the object store. Returns sample_ids and the reference of (n, size, size, 3) uint8.

    Driver memory: 8 bytes a sample. Object store: 3·size² bytes a sample, and twice that while the parts are joined.
    Raises ValueError for an image that cannot be decoded, and names it.
    """
    return _load(_decode_file, [(path, size) for path in run_dir.table_files(schema.PROXY_IMAGES)])


def load_embeddings(run_dir: RunDir) -> list[Any]:
    """Return references to the data of a linear proxy: a TrainingPool, then embeddings (n, d) float16.

    Driver memory: 50 bytes a sample. Object store: 2·d bytes a sample, and twice that while the parts are joined.
    """
    sample_ids, embeddings = _load(_read_embeddings, [(path,) for path in run_dir.table_files(schema.EMBEDDINGS)])
    return [put(read_pool(run_dir, sample_ids, schema.EMBEDDINGS)[0]), embeddings]


def _load(read: Callable[..., tuple[np.ndarray, np.ndarray]], tasks: list[tuple]) -> tuple[np.ndarray, Any]:
    """Return (sample_ids, reference of the rows) of all files; `read` returns the ids and rows of one."""
    # Two returns, so that the ids come to the driver and the rows stay in the object store.
    parts: list[Any] = [start_task(read, *task, num_returns=2) for task in tasks]
    sample_ids = np.concatenate([get_result(ids) for ids, _ in parts])
    return sample_ids, share(_join, *[rows for _, rows in parts])


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
