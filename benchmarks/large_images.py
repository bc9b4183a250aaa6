"""Measure the memory of embed over a pool of large images: of all processes, of the object store, and what is spilled.

    python benchmarks/large_images.py [--gigabytes 20] [--quick]

The pool is photographs of 3,200 x 2,400 pixels and about 2 MB at an S3 server, which makes each one when it is asked
for it, so that the pool takes no room. Ray's object store has 1 GB. Embed runs twice: as on CPUs, where encoders decode
their own images, and as on GPUs, where tasks decode, and 1.1 MB of pixels an image go through the object store. There a
logical GPU stands for a real one, and the means of 64 squares for the encoder, so that the pool passes quickly.

Prints a line of JSON for each half of the images: the largest private memory of the driver and of each kind of worker,
without the object store, which all map; the most that was in the object store; what was spilled until then.
"""

import http.server
import io
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from helpers.object_store import environment, free_port
from helpers.processes import Watch
from helpers.reporting import command_line
from PIL import Image
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from elfs_ray.config import Config, load_config
from elfs_ray.pipeline import runner
from elfs_ray.runtime import progress
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.embed import ray_stream
from elfs_ray.stages.embed.worker import EmbedJob, EncodeBlock

STORE_BYTES = 1_000_000_000
SIZE = (3200, 2400)
SIDE = 600  # of the pixels that go through the object store
NUM_CPUS = 2
KINDS = {
    "on CPUs": ("embed.device=cpu", "embed.image_size=224", f"embed.num_workers={NUM_CPUS}"),
    "as on GPUs": ("embed.device=cuda", f"embed.image_size={SIDE}", "embed.num_workers=1"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer a request for any object with the photograph, which differs by the object's name in a comment."""

    protocol_version = "HTTP/1.1"
    photograph = b""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name = self.path.encode()
        # A comment is a segment of a JPEG, and comes after its two bytes of signature.
        comment = b"\xff\xfe" + (len(name) + 2).to_bytes(2, "big") + name
        data = self.photograph[:2] + comment + self.photograph[2:]
        part = data
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        if with_body:
            self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


def make_photograph() -> bytes:
    """Return a JPEG of a real photograph, enlarged and made noisy, as a camera's are."""
    from sklearn.datasets import load_sample_image

    pixels = np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize(SIZE, Image.Resampling.BICUBIC))
    noise = np.random.default_rng(0).normal(0, 6, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def serve(port: int, photograph: bytes) -> None:
    Handler.photograph = photograph
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


class MeansOfSquares:
    """Stand for an encoder on a GPU: the mean of each of 8 x 8 squares of the image."""

    dim, name = 192, "means"

    def encode(self, images: np.ndarray) -> np.ndarray:
        n, side = images.shape[:2]
        squares = images.reshape(n, 8, side // 8, 8, side // 8, 3).mean(axis=(2, 4))
        return squares.reshape(n, -1).astype(np.float32) - 128


class EncodeWithoutGpu(EncodeBlock):
    """Take decoded blocks from the object store as the encoder of a GPU does."""

    def __init__(self, job: EmbedJob, device: str) -> None:
        super().__init__(job, "cpu", MeansOfSquares())  # type: ignore[arg-type]


class Halves:
    """Watch the memory of each half of the images apart: `see` listens to the run's progress."""

    def __init__(self, kind: str, num_images: int) -> None:
        self._kind, self._num_images = kind, num_images
        self._watch, self._half, self._most_in_store = Watch().__enter__(), "first", 0
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)

    def see(self, name: str, unit: str, done: int, total: int, rate: float, running: bool) -> None:
        if name != "embed":
            return
        stats = get_memory_info_reply(self._state).store_stats
        self._most_in_store = max(self._most_in_store, stats.object_store_bytes_used)
        if self._half == "first" and 2 * done >= total:
            self.end()
            self._watch, self._half, self._most_in_store = Watch().__enter__(), "second", 0

    def end(self) -> None:
        """Print the memory of this half."""
        self._watch.__exit__()
        stats = get_memory_info_reply(self._state).store_stats
        sizes = {
            **self._watch.peaks,
            "object store": self._most_in_store,
            "spilled": stats.spilled_bytes_total,
            "all together": self._watch.peak_bytes,
        }
        line: dict[str, str | float] = {name: f"{size / 1e6:,.0f} MB" for name, size in sizes.items()}
        seconds = {"seconds": round(self._watch.seconds, 1), "cpu_s": round(self._watch.cpu_seconds, 1)}
        print(json.dumps({"name": f"embed {self._kind}, {self._half} half", **seconds, **line}), flush=True)


def config_of(run_dir: Path, pool: Path, keys: tuple[str, ...]) -> Config:
    encoder = ("embed.encoder=efficientnet_lite0", "embed.runtime=torch")
    selection = ("select.method=coverage", "budget=0.5", "until=embed")
    where = (f"run_dir={run_dir}", f"pool.uri={pool}", "pool.image_column=uri", "ray_address=local")
    return load_config(None, [*where, *encoder, *selection, *keys])


def measure(kind: str, folder: Path, pool: Path, num_images: int) -> None:
    """Embed the pool by Ray with an object store of 1 GB."""
    on_gpus = kind != "on CPUs"
    connect("local", num_cpus=NUM_CPUS, num_gpus=int(on_gpus), object_store_memory=STORE_BYTES)
    if on_gpus:
        # By value, since Ray's workers do not know this script.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray_stream.EncodeBlock = EncodeWithoutGpu  # type: ignore[misc,assignment]
    halves = Halves(kind, num_images)
    progress.listen(halves.see)
    runner.run(config_of(folder / kind.replace(" ", "-"), pool, KINDS[kind]))
    halves.end()
    ray.shutdown()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="0.3 GB, as on CPUs")
    parser.add_argument("--gigabytes", type=float, default=20.0, help="size of the pool")
    arguments = parser.parse_args()
    photograph, port = make_photograph(), free_port()
    num_images = int((0.3 if arguments.quick else arguments.gigabytes) * 1e9 / len(photograph))
    print(json.dumps({"name": "pool", "images": num_images, "bytes": num_images * len(photograph)}), flush=True)
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(port, photograph), daemon=True)
    server.start()
    os.environ |= environment(port)
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool.parquet"
        pq.write_table(pa.table({"uri": [f"s3://photographs/{n:06d}.jpg" for n in range(num_images)]}), pool)
        for kind in list(KINDS)[: 1 if arguments.quick else None]:
            # In a process of its own, so that neither adds to the driver's peak of the other.
            run = context.Process(target=measure, args=(kind, Path(folder), pool, num_images))
            run.start()
            run.join()
    server.terminate()


if __name__ == "__main__":
    main()
