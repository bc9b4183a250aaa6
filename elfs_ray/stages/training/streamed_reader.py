"""Stream training images from proxy_images/, for pools larger than memory, on local disks or in an object store.

The unit of reading is a chunk: a row group of a Parquet file, about 1 MiB of encoded images as embed writes them. The
training process computes an epoch's order (`streamed_order` in methods/training/dynamics.py) and sends each batch, in
parts, to its decoder processes. A decoder reads the chunks of its part in advance, decodes and crops. The order keeps
the samples of a chunk close together, so that each chunk is read about once an epoch and not once for every sample.

Memory of a worker: 16 bytes a sample once a node, and 8 bytes a sample for an epoch's order (41 while it is made). Its
decoders hold (64 lanes / all decoders + 1)·6 chunks and 4 parts of a batch each.
"""

import multiprocessing
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from elfs_ray.methods.training.dynamics import NUM_LANES, WINDOW_CHUNKS, BatchPlan, Step, streamed_order
from elfs_ray.pool.images import decode_proxy_image, describe_bad_copy
from elfs_ray.runtime.tasks import put, run_tasks
from elfs_ray.stages.training.reader import (
    Augmentation,
    Batch,
    InMemoryReader,
    Reader,
    TrainingPool,
    load_images,
    read_pool,
    targets_on,
)
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

PARTS_AHEAD = 4  # decoded parts that wait for the training process, for each decoder
READ_AHEAD = 8  # parts whose chunks are being read, for each decoder
READ_THREADS = 4  # a read from a bucket mostly waits
MAX_OPEN_FOOTERS = 1024
PoolOf = Callable[[RunDir, np.ndarray], tuple[TrainingPool, np.ndarray]]


@dataclass(frozen=True)
class ChunkTable:
    """The place of each chunk: files (k,) int32 index `paths`, row_groups (k,) int32; sizes (k,) int64 in samples."""

    paths: list[str]
    files: np.ndarray
    row_groups: np.ndarray
    sizes: np.ndarray


class _Part(NamedTuple):
    """One decoder's part of a batch: sample_ids, their chunks and rows in these, each (m,); chunks to read ahead."""

    epoch: int
    sample_ids: np.ndarray
    chunks: np.ndarray
    rows: np.ndarray
    upcoming: np.ndarray


def load_data(run_dir: RunDir, reading: str, proxy_size: int, pool_of: PoolOf = read_pool) -> list[Any]:
    """Return references to the data of `make_reader`: a TrainingPool, then decoded images or a ChunkTable.

    `pool_of` returns the samples to train on and their positions among all images, as `read_pool` does.
    """
    if reading == "streamed":
        pool, chunks = scan_chunks(run_dir, pool_of)
        return [put(pool), put(chunks)]
    image_ids, images = load_images(run_dir, proxy_size)
    return [put(pool_of(run_dir, image_ids)[0]), images]


def make_reader(
    pool: TrainingPool,
    images: np.ndarray | ChunkTable,
    augmenter: Augmentation,
    plan: BatchPlan,
    device: torch.device,
    *,
    proxy_size: int,
    num_decoders: int,
) -> Reader:
    """Return the reader of the data of `load_data` or `load_embeddings`; `images` may be embeddings."""
    if isinstance(images, ChunkTable):
        return StreamedReader(pool, images, augmenter, plan, device, proxy_size=proxy_size, num_decoders=num_decoders)
    return InMemoryReader(pool, images, augmenter, plan, device)


def scan_chunks(run_dir: RunDir, pool_of: PoolOf = read_pool) -> tuple[TrainingPool, ChunkTable]:
    """Return the samples to train on and the chunks that hold their images.

    Reads footers and ids only. Driver memory: 40 bytes a sample. Raises ValueError for samples without an image.
    """
    paths = run_dir.table_files(schema.PROXY_IMAGES)
    scanned: list[Any] = [None] * len(paths)
    for position, result in run_tasks(_scan_file, [(path,) for path in paths]):
        scanned[position] = result
    num_groups = [len(sizes) for _, sizes in scanned]
    pool, positions = pool_of(run_dir, np.concatenate([ids for ids, _ in scanned]))

    starts = np.cumsum([0, *chain.from_iterable(sizes for _, sizes in scanned)])
    chunks = np.searchsorted(starts, positions, side="right") - 1
    # A chunk counts only the samples to train on, and a chunk without any is left out.
    sizes = np.bincount(chunks, minlength=len(starts) - 1)
    used = np.flatnonzero(sizes)
    files = np.repeat(np.arange(len(paths), dtype=np.int32), num_groups)
    row_groups = np.concatenate([np.arange(count, dtype=np.int32) for count in num_groups])
    rows = (positions - starts[chunks]).astype(np.int32)
    table = ChunkTable(paths, files[used], row_groups[used], sizes[used])
    return TrainingPool(pool.sample_ids, pool.targets, rows), table


def _scan_file(path: str) -> tuple[np.ndarray, list[int]]:
    """Return the ids in a file and the number of rows of each of its row groups."""
    with filesystem.open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        return file.read([schema.SAMPLE_ID])[schema.SAMPLE_ID].to_numpy(), sizes


class StreamedReader:
    """Reads batches that `num_decoders` processes decode; `proxy_size` is the short side of the images.

    Global batches are the same for any number of workers and decoders.
    """

    def __init__(
        self,
        pool: TrainingPool,
        chunks: ChunkTable,
        augmenter: Augmentation,
        plan: BatchPlan,
        device: torch.device,
        *,
        proxy_size: int,
        num_decoders: int,
    ):
        self._pool, self._chunks, self._augmenter, self._plan = pool, chunks, augmenter, plan
        self._device, self._num_decoders = device, num_decoders
        self._chunk_starts = np.cumsum(chunks.sizes) - chunks.sizes
        self._parts: Iterable[_Part] = ()
        lanes = -(-NUM_LANES // (plan.world_size * num_decoders)) + 1
        decoder = _Decoder(chunks, augmenter, proxy_size, max_chunks=lanes * (WINDOW_CHUNKS + 2))
        self._loader = _make_loader(decoder, _PartsOfTheEpoch(self), num_decoders, pin_memory=device.type == "cuda")

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        order = streamed_order(self._chunks.sizes, self._augmenter.seed, epoch, self._plan.global_batch)
        self._parts = self._make_parts(order, epoch, first)
        decoded = iter(self._loader)
        for step in self._plan.steps(first):
            yield step.num_real, [self._batch(order[m.positions], m.mask, decoded, epoch) for m in step.micro_batches]

    def _batch(self, samples: np.ndarray, mask: np.ndarray, decoded: Iterator[torch.Tensor | str], epoch: int) -> Batch:
        parts = []
        for _ in range(self._num_decoders):
            part = next(decoded)
            # A decoder returns an error as a message: torch would raise it with the traceback of another process in
            # the text.
            if isinstance(part, str):
                raise ValueError(part)
            parts.append(part.to(self._device, non_blocking=True))
        sample_ids = self._pool.sample_ids[samples]
        images = self._augmenter.finish(torch.cat(parts), sample_ids, epoch)
        return Batch(sample_ids, mask, images, targets_on(self._device, self._pool.targets[samples]))

    def _make_parts(self, order: np.ndarray, epoch: int, first: int) -> Iterator[_Part]:
        """Yield every micro-batch of the epoch from step `first` on in as many parts as there are decoders."""
        parts = self._split(order, self._plan.steps(first))
        ahead = deque(islice(parts, READ_AHEAD * self._num_decoders))
        while ahead:
            samples, chunks = ahead.popleft()
            upcoming = np.empty(0, np.int64)
            # The loader deals parts to decoders in turn, so this later part goes to the same decoder.
            following = next(parts, None)
            if following is not None:
                ahead.append(following)
                upcoming = np.unique(following[1])
            yield _Part(epoch, self._pool.sample_ids[samples], chunks, self._pool.rows[samples], upcoming)

    def _split(self, order: np.ndarray, steps: Iterable[Step]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (samples, their chunks) for each part."""
        for step in steps:
            for micro_batch in step.micro_batches:
                for samples in np.array_split(order[micro_batch.positions], self._num_decoders):
                    yield samples, np.searchsorted(self._chunk_starts, samples, side="right") - 1


class _PartsOfTheEpoch:
    """The loader's sampler: iterates over the parts of the reader's current epoch.

    The loader keeps its processes, and with them this one sampler, from epoch to epoch.
    """

    def __init__(self, reader: StreamedReader):
        self._reader = reader

    def __iter__(self) -> Iterator[_Part]:
        return iter(self._reader._parts)


def _make_loader(decoder: "_Decoder", parts: Iterable[_Part], num_decoders: int, *, pin_memory: bool) -> DataLoader:
    """Return torch's loader of parts, which takes one from each decoder in turn."""
    # Decoders are processes: for a small image Python takes longer than Pillow, and threads would take that time from
    # the training loop, which holds the same interpreter lock.
    # Not by "fork": this process has threads of Ray, Arrow and torch, and a fork in which a lock is held hangs. The
    # server forks from a process without threads that has imported this module, which is quicker than "spawn".
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    with warnings.catch_warnings(action="ignore"):  # torch warns of more processes than CPUs, which the config decides
        return DataLoader(
            decoder,
            batch_size=None,
            sampler=parts,
            num_workers=num_decoders,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            prefetch_factor=PARTS_AHEAD,
            persistent_workers=True,
            multiprocessing_context=processes,
        )


def _unchanged(part: Any) -> Any:
    return part


class _Decoder(Dataset):
    """Decodes and crops the images of parts, in a decoder process; keeps the chunks that later parts need."""

    def __init__(self, chunks: ChunkTable, augmenter: Augmentation, proxy_size: int, max_chunks: int):
        self._chunks, self._augmenter, self._proxy_size = chunks, augmenter, proxy_size
        self._max_chunks = max_chunks
        self._read: OrderedDict[int, Future[pa.Array]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None  # started in the decoder process: threads cannot be pickled

    def __getitem__(self, part: _Part) -> torch.Tensor | str:
        """Return a part's images (m, ..., size, size, 3) uint8, or a message about one that cannot be decoded."""
        needed = self._request(np.unique(part.chunks))
        self._request(part.upcoming)
        # The limit is the number of chunks in the lanes that this decoder may meet (see StreamedReader): with a lower
        # one, chunks would be read twice.
        while len(self._read) > max(self._max_chunks, len(needed) + len(part.upcoming)):
            self._read.popitem(last=False)
        # Whole photographs differ in size, so they are cropped one by one; centre squares are cropped as a batch.
        is_whole, side = self._augmenter.takes_whole_images, self._proxy_size
        squares = np.empty((0 if is_whole else len(part.sample_ids), side, side, 3), np.uint8)
        crops = []
        for position, (chunk, row) in enumerate(zip(part.chunks.tolist(), part.rows.tolist(), strict=True)):
            encoded = needed[chunk].result()[row].as_py()
            try:
                if is_whole:
                    crops.append(self._crop_whole(encoded, part.sample_ids[position : position + 1], part.epoch))
                else:
                    squares[position] = decode_proxy_image(encoded, side)
            except Exception as error:
                path = self._chunks.paths[self._chunks.files[chunk]]
                return describe_bad_copy(part.sample_ids[position], path, error)
        if crops:
            return torch.cat(crops)
        # Without any image, of a batch smaller than the decoders are many, `crop` gives the shape.
        return self._augmenter.crop(torch.from_numpy(squares), part.sample_ids, part.epoch)

    def _crop_whole(self, encoded: bytes, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        """Return a crop of one photograph, (1, ..., size, size, 3) uint8."""
        return self._augmenter.crop(torch.from_numpy(decode_proxy_image(encoded)[None].copy()), sample_ids, epoch)

    def _request(self, chunks: np.ndarray) -> "dict[int, Future[pa.Array]]":
        """Start reading the chunks that are not in memory; return them all. They will be the last to be dropped."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(READ_THREADS)
        for chunk in chunks.tolist():
            if chunk not in self._read:
                path = self._chunks.paths[self._chunks.files[chunk]]
                self._read[chunk] = self._threads.submit(_read_chunk, path, int(self._chunks.row_groups[chunk]))
            self._read.move_to_end(chunk)
        return {chunk: self._read[chunk] for chunk in chunks.tolist()}


# A file has many chunks, and without this each of their reads would begin by reading the footer.
@lru_cache(maxsize=MAX_OPEN_FOOTERS)
def _footer(path: str) -> pq.FileMetaData:
    with filesystem.open_parquet(path) as file:
        return file.metadata


def _read_chunk(path: str, row_group: int) -> pa.Array:
    """Return the encoded images of a chunk, (rows,) binary."""
    filesystem_, inner = filesystem.resolve(path)
    with pq.ParquetFile(inner, filesystem=filesystem_, metadata=_footer(path)) as file:
        rows = file.read_row_group(row_group, columns=[schema.IMAGE], use_threads=False)
    return rows[schema.IMAGE].combine_chunks()
