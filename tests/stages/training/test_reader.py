"""Readers: every sample once an epoch, the same global batches for any number of workers, in memory and streamed."""

import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from elfs_ray.methods.training import augmentation
from elfs_ray.methods.training.dynamics import BatchPlan, streamed_order
from elfs_ray.pool.images import encode_png
from elfs_ray.stages.training.reader import Augmenter, InMemoryReader, load_images, read_pool
from elfs_ray.stages.training.streamed_reader import StreamedReader, scan_chunks
from elfs_ray.storage.run_dir import RunDir
from tests.tables import GAPS, IMAGE_SIZE, digit_images, digits_config, write_clustered

NUM_SAMPLES = 1003
EMBEDDED = np.setdiff1d(np.arange(NUM_SAMPLES), GAPS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    """1,003 digits, three of them rejected, in files of 150 rows and chunks of 10."""
    folder = tmp_path_factory.mktemp("run")
    write_clustered(RunDir(str(folder)), NUM_SAMPLES)
    in_chunks_of(folder, 10)
    return RunDir(str(folder))


def in_chunks_of(folder: Path, rows: int) -> None:
    for path in (folder / "proxy_images").iterdir():
        pq.write_table(pq.read_table(path), path, row_group_size=rows)


def augmenter(run_dir: RunDir, *overrides: str, size: int = IMAGE_SIZE) -> Augmenter:
    config = digits_config(Path(run_dir.uri), *overrides)
    return Augmenter(config.train, config.seed, size)


def streamed(
    run_dir: RunDir, *overrides: str, rank: int = 0, num_workers: int = 1, num_decoders: int = 1, size: int = IMAGE_SIZE
) -> StreamedReader:
    pool, chunks = scan_chunks(run_dir)
    plan = BatchPlan(len(pool.sample_ids), 50, rank, num_workers, 7)
    return StreamedReader(
        pool,
        chunks,
        augmenter(run_dir, *overrides, size=size),
        plan,
        CPU,
        proxy_size=IMAGE_SIZE,
        num_decoders=num_decoders,
    )


def in_memory(run_dir: RunDir, *overrides: str, rank: int = 0, num_workers: int = 1) -> InMemoryReader:
    image_ids, images = load_images(run_dir, IMAGE_SIZE)
    pool, _ = read_pool(run_dir, image_ids)
    plan = BatchPlan(len(pool.sample_ids), 50, rank, num_workers, 7)
    return InMemoryReader(pool, ray.get(images), augmenter(run_dir, *overrides), plan, CPU)


def epoch_of(reader, epoch: int) -> tuple[list[list[int]], dict[int, bytes], dict[int, int]]:
    """Return the sample ids of each step, and each sample's image and target. No sample may come twice."""
    steps, images, targets = [], {}, {}
    for _, batches in reader.steps(epoch):
        ids = []
        for batch in batches:
            for row in np.flatnonzero(batch.mask):
                sample_id = int(batch.sample_ids[row])
                assert sample_id not in images
                ids.append(sample_id)
                images[sample_id] = batch.inputs[row].contiguous().numpy().tobytes()
                targets[sample_id] = int(batch.targets[row])
        steps.append(ids)
    return steps, images, targets


@pytest.mark.parametrize("make", [in_memory, pytest.param(streamed, marks=pytest.mark.slow)])
def test_any_number_of_workers_takes_the_same_global_batches(ray_cluster, run_dir, make):
    alone = None
    for num_workers in (1, 2, 3):
        parts = [epoch_of(make(run_dir, rank=rank, num_workers=num_workers), 3) for rank in range(num_workers)]
        batches = [sorted(chain(*step)) for step in zip(*(steps for steps, _, _ in parts), strict=True)]
        images = {sample_id: image for _, part, _ in parts for sample_id, image in part.items()}
        targets = {sample_id: target for _, _, part in parts for sample_id, target in part.items()}
        assert sorted(chain(*batches)) == EMBEDDED.tolist()
        assert [len(batch) for batch in batches] == [50] * 20
        alone = alone or (batches, images, targets)
        assert (batches, images, targets) == alone
    assert alone[2] == dict(zip(EMBEDDED.tolist(), digit_images(NUM_SAMPLES)[1][EMBEDDED].tolist(), strict=True))


@pytest.mark.parametrize("make", [in_memory, pytest.param(streamed, marks=pytest.mark.slow)])
def test_a_resumed_epoch_goes_on_with_the_same_batches(ray_cluster, run_dir, make):
    whole = list(make(run_dir, rank=1, num_workers=2).steps(3))
    rest = list(make(run_dir, rank=1, num_workers=2).steps(3, first=13))
    assert len(rest) == len(whole) - 13
    for (num_real, batches), (expected_real, expected) in zip(rest, whole[13:], strict=True):
        assert num_real == expected_real
        for batch, other in zip(batches, expected, strict=True):
            assert batch.sample_ids.tolist() == other.sample_ids.tolist()
            assert torch.equal(batch.inputs, other.inputs) and torch.equal(batch.targets, other.targets)


@pytest.mark.slow
def test_streamed_images_equal_those_in_memory_for_any_number_of_decoders(ray_cluster, run_dir):
    _, expected, targets = epoch_of(in_memory(run_dir), 1)
    for num_decoders in (1, 3):
        reader = streamed(run_dir, num_decoders=num_decoders)
        for _ in range(2):  # an epoch may be read again
            _, images, read_targets = epoch_of(reader, 1)
            assert images == expected and read_targets == targets


@pytest.mark.slow
def test_every_epoch_and_seed_has_an_order_and_crops_of_its_own(ray_cluster, run_dir):
    reader = streamed(run_dir)
    first, second = epoch_of(reader, 0), epoch_of(reader, 1)
    other_seed = epoch_of(streamed(run_dir, "seed=1"), 0)
    for other in (second, other_seed):
        assert other[0] != first[0]
        assert sum(other[1][i] != first[1][i] for i in EMBEDDED.tolist()) > 500


@pytest.mark.slow
def test_photographs_of_any_shape_are_cropped_as_wholes(ray_cluster, tmp_path, photographs):
    """Every crop equals that of the whole photograph alone, so pixels outside the centre square are seen."""
    write_clustered(RunDir(str(tmp_path)), 60)
    wholes = {}
    for path in sorted((tmp_path / "proxy_images").iterdir()):
        rows = pq.read_table(path)
        files = []
        for sample_id in rows["sample_id"].to_pylist():
            shape = (8 + sample_id % 9, 8) if sample_id % 2 else (8, 8 + sample_id % 20)
            image = photographs[sample_id % 2].resize(shape)
            wholes[sample_id] = np.asarray(image)
            files.append(encode_png(image))
        pq.write_table(rows.set_column(1, "image", [files]), path, row_group_size=7)
    reader = streamed(RunDir(str(tmp_path)), "train.augmentation=resized_crop_flip", num_decoders=2)
    _, images, _ = epoch_of(reader, 2)
    assert len(images) == 60 - sum(gap < 60 for gap in GAPS)
    config = digits_config(tmp_path)
    for sample_id, image in images.items():
        whole = torch.from_numpy(wholes[sample_id][None].copy())
        crop = augmentation.random_resized_crop_flip(
            whole, np.array([sample_id]), seed=config.seed, epoch=2, size=IMAGE_SIZE
        )
        expected = augmentation.normalize(crop, config.train.mean, config.train.std)
        assert image == expected[0].contiguous().numpy().tobytes()


@pytest.mark.parametrize("data", [b"not an image", b""])
def test_a_corrupt_proxy_image_is_named(ray_cluster, tmp_path, data):
    write_clustered(RunDir(str(tmp_path)), 200)
    path = sorted((tmp_path / "proxy_images").iterdir())[1]
    rows = pq.read_table(path)
    files = rows["image"].to_pylist()
    files[rows["sample_id"].to_pylist().index(177)] = data
    pq.write_table(rows.set_column(1, "image", [files]), path)
    message = f"sample_id 177 in {path} cannot be decoded"
    with pytest.raises(ValueError, match=message):
        in_memory(RunDir(str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        epoch_of(streamed(RunDir(str(tmp_path))), 0)


def test_samples_without_an_image_are_named(ray_cluster, tmp_path):
    write_clustered(RunDir(str(tmp_path)), 200)
    sorted((tmp_path / "proxy_images").iterdir())[1].unlink()
    with pytest.raises(ValueError, match=r"50 samples have no row in proxy_images/, such as sample_id \[150, "):
        scan_chunks(RunDir(str(tmp_path)))


def test_images_without_a_pseudo_label_are_skipped(ray_cluster, tmp_path):
    write_clustered(RunDir(str(tmp_path)), 200)
    for path in (tmp_path / "clusters" / "pseudo_labels").iterdir():
        rows = pq.read_table(path)
        pq.write_table(rows.filter(rows["sample_id"].to_numpy() % 3 > 0), path)
    labelled = [i for i in EMBEDDED.tolist() if i < 200 and i % 3]
    _, labels = digit_images(200)
    for reader in (in_memory(RunDir(str(tmp_path))), streamed(RunDir(str(tmp_path)))):
        _, _, targets = epoch_of(reader, 0)
        assert targets == {i: labels[i] for i in labelled}


@pytest.mark.parametrize("sizes", [[1], [7], [3, 1, 5], [10] * 300 + [3], [2000, 1, 1, 500], list(range(1, 200))])
def test_streamed_order_is_a_permutation_for_chunks_of_any_sizes(sizes):
    sizes = np.array(sizes)
    for global_batch in (1, 64, 5000):
        order = streamed_order(sizes, 0, 0, global_batch)
        np.testing.assert_array_equal(np.sort(order), np.arange(sizes.sum()))


def test_streamed_batches_mix_the_whole_pool_differently_every_epoch():
    sizes = np.full(1000, 64)
    batches = streamed_order(sizes, 0, 0, 256).reshape(-1, 256)
    chunks = [len(np.unique(batch // 64)) for batch in batches]
    assert np.mean(chunks) > 120  # 64 lanes, about 4 rows of each, in windows of 4 chunks
    means = batches.mean(1) / sizes.sum()
    assert abs(means - 0.5).max() < 0.2
    other = streamed_order(sizes, 0, 1, 256).reshape(-1, 256)
    assert max(len(np.intersect1d(batch, other[0])) for batch in batches) < 64


def test_a_worker_reads_its_own_lanes_only():
    """Of 8 workers, each needs an eighth of the chunks and a few at the borders, and few at a time."""
    sizes = np.full(2048, 64)
    order = streamed_order(sizes, 0, 0, 256)
    for rank in (0, 3, 7):
        plan = BatchPlan(len(order), 256, rank, 8)
        steps = [np.unique(order[m.positions] // 64) for step in plan.steps() for m in step.micro_batches]
        read = np.unique(np.concatenate(steps))
        assert len(read) < 1.15 * 2048 / 8 + 8
        last_use = {chunk: step for step, chunks in enumerate(steps) for chunk in chunks.tolist()}
        held: set[int] = set()
        for step, chunks in enumerate(steps):
            held = {chunk for chunk in held | set(chunks.tolist()) if last_use[chunk] >= step}
            assert len(held) <= (64 // 8 + 1) * 6


def test_memory_of_an_order_is_what_its_docstring_says():
    for num_chunks in (2_000, 4_000):
        tracemalloc.start()
        order = streamed_order(np.full(num_chunks, 64), 0, 0, 256)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak / len(order) < 41.5
