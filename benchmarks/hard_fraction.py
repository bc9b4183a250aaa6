"""Compare the hard fractions of auto and of search with a grid of them, the paper's value and random samples.

    python benchmarks/hard_fraction.py [--quick] [--pool FILE --num-images 10000] [--folder FOLDER]

Without --pool, the pool is the 4,000 digits of jobs/quickstart.py, tested on its 1,000. With it, the pool is the first
images of a Parquet file (image, label), tested on the 2,000 that follow. The pipeline trains the proxy on
pseudo-labels; then a network is trained from scratch with the true labels on the coreset of every hard fraction, as an
evaluation does. All accuracies are means over seeds. --folder keeps the run and every accuracy, so that a second call
repeats none.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from helpers.reporting import command_line, emit

from elfs_ray import load_config
from elfs_ray.config import Config
from elfs_ray.methods.selection import pruning
from elfs_ray.methods.selection.hard_fraction import fraction_grid
from elfs_ray.methods.training.classifier import LabelledImages, train_and_test
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.pool.images import decode_proxy_image
from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select.hard_fraction import estimate_hard_fractions
from elfs_ray.stages.select.hard_fraction_search import search_hard_fractions
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.selection import Budget, choose
from elfs_ray.stages.training.classifier_inputs import kept_or_computed, load_proxy_images, training_settings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

JOBS = Path(__file__).parent.parent / "jobs"
BUDGETS = [0.01, 0.05, 0.1, 0.3]
NUM_TEST = 2_000
FIXED = (0.0, 0.4, 0.5)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 digits, one seed; under 45 s on 2 cores")
    parser.add_argument("--pool", help="Parquet file of images and labels")
    parser.add_argument("--num-images", type=int, default=10_000, help="number of its images to choose from")
    parser.add_argument("--folder", help="folder that keeps the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        images, test = write_pool(folder, arguments.pool, 1_000 if arguments.quick else arguments.num_images)
        config = configure(folder, images, of_digits=arguments.pool is None, quick=arguments.quick)
        pipeline.run(config)
        connect(config.ray_address)  # the pipeline does not start Ray for a run that is complete
        name = Path(arguments.pool).parent.name if arguments.pool else "digits"
        compare(config, test, name, num_seeds=1 if arguments.quick else 2)


def write_pool(folder: Path, source: str | None, num_images: int) -> tuple[Path, Path]:
    """Write the images to choose from and those to test on. Return both paths."""
    if source is None:
        sys.path.insert(0, str(JOBS.parent))
        from jobs.quickstart import write_digits

        write_digits(folder)
        if num_images >= 4_000:
            return folder / "pool.parquet", folder / "test.parquet"
        source = str(folder / "pool.parquet")
    rows = pq.read_table(source, columns=["image", "label"])
    filesystem.write_table(str(folder / "chosen.parquet"), rows.slice(0, num_images))
    filesystem.write_table(str(folder / "held.parquet"), rows.slice(num_images, NUM_TEST))
    return folder / "chosen.parquet", folder / "held.parquet"


def configure(folder: Path, images: Path, *, of_digits: bool, quick: bool) -> Config:
    """Return the config of jobs/quickstart.py for this pool, with longer trainings."""
    overrides = [f"pool.uri={images}", f"run_dir={folder / 'run'}", f"budget={0.05 if quick else BUDGETS}"]
    overrides += ["select.search_iterations=200", "train.epochs=12", "train.num_workers=2", "until=select"]
    overrides += ["embed.proxy_image_size=28", "evaluate.iterations=200", "evaluate.batch_size=64"]
    if of_digits:
        overrides += ["cluster.num_clusters=30", "select.balance=true"]
    if quick:
        overrides += ["train.epochs=4", "train.num_workers=1", "select.search_step=0.4", "select.search_iterations=40"]
    return load_config(JOBS / "quickstart.yaml", overrides)


def compare(config: Config, test_path: Path, name: str, num_seeds: int) -> None:
    """Print for each budget the accuracies of auto and of search vs. the best of the grid, fixed values and random."""
    run_dir = RunDir(config.run_dir)
    files = tuple(run_dir.table_files(schema.SCORES))
    num_groups = ClusterResult.read(run_dir).num_clusters if config.select.balance else 1
    pool = ScoredPool(files, config.select.score, "low", IndexResult.read(run_dir).rows, num_groups)
    counts = [pruning.budget_count(budget, pool.num_samples) for budget in config.budgets]
    autos = [beta for beta, _ in estimate_hard_fractions(config, run_dir, pool, counts)]
    searched = [beta for beta, _ in search_hard_fractions(config, run_dir, pool, counts)]
    trainer = Trainer(config, run_dir, pool, test_path, num_seeds)
    trials: dict[tuple[int, float | None], None] = {}  # an ordered set
    grids = [fraction_grid(config.select.search_step, count, pool.num_samples) for count in counts]
    for count, auto, search, grid in zip(counts, autos, searched, grids, strict=True):
        trials |= dict.fromkeys((count, beta) for beta in [*grid, auto, search, *fixed(count, pool.num_samples), None])
    accuracy = trainer.accuracies(list(trials))
    for count, auto, search, grid in zip(counts, autos, searched, grids, strict=True):
        best = max(grid, key=lambda beta: accuracy[count, beta])
        what = f"test accuracy with {count} of {pool.num_samples:,} {name}"
        others = {f"best of the grid, β={best:g}": best}
        others |= {f"β={beta:g}": beta for beta in fixed(count, pool.num_samples)}
        for way, ours in ((f"auto, β={auto:.3g}", auto), (f"search, β={search:g}", search)):
            for other, beta in others.items():
                emit(f"{what}: {way}", accuracy[count, ours], "share", other, accuracy[count, beta])
        emit(f"{what}: auto, β={auto:.3g}", accuracy[count, auto], "share", "random", accuracy[count, None])


def fixed(count: int, num_samples: int) -> list[float]:
    """Return the hard fractions that one would choose without looking at the pool, up to the largest possible one."""
    return [beta for beta in FIXED if beta <= 1 - count / num_samples]


class Trainer:
    """Train on coresets with true labels and test, several seeds each, as Ray tasks."""

    def __init__(self, config: Config, run_dir: RunDir, scored: ScoredPool, test_path: Path, num_seeds: int) -> None:
        self._config, self._num_seeds, self._scored = config, num_seeds, scored
        self._ids = np.concatenate([scored.read(path).sample_ids for path in scored.files])
        labels = run_dir.read_rows(schema.INDEX, self._ids, [schema.LABEL])[schema.LABEL].to_numpy()
        pool = LabelledImages(load_proxy_images(run_dir, self._ids, config.embed.proxy_image_size), labels, self._ids)
        # In a list, so that Ray passes the reference itself: a task whose accuracy is known loads no images.
        self._images = [ray.put((pool, read_test(test_path, config.embed.proxy_image_size)))]

    def accuracies(self, trials: Sequence[tuple[int, float | None]]) -> dict[tuple[int, float | None], float]:
        """Return the mean accuracy of each (samples to keep, hard fraction); None keeps random samples."""
        folder = RunDir(self._config.run_dir).path("trainings")
        kept = self._windows([Budget(count, beta) for count, beta in trials if beta is not None])
        tasks = [
            (
                f"{folder}/{count}-{beta}-{seed}.json",
                self._images,
                pruning.random_selection(self._ids, count, seed) if beta is None else kept[Budget(count, beta)],
                self._config,
                seed,
            )
            for count, beta in trials
            for seed in range(self._num_seeds)
        ]
        accuracies = np.zeros(len(tasks))
        for position, accuracy in run_tasks(train, tasks):
            accuracies[position] = accuracy
        return dict(zip(trials, accuracies.reshape(-1, self._num_seeds).mean(1).tolist(), strict=True))

    def _windows(self, budgets: list[Budget]) -> dict[Budget, np.ndarray]:
        """Return the positions in the pool that double-end pruning keeps for each budget."""
        selections = choose(self._scored, self._config.select, self._config.seed, budgets)
        parts = [self._scored.read(path) for path in self._scored.files]
        masks = [np.concatenate([selection.mask(self._scored, rows) for rows in parts]) for selection in selections]
        return {budget: np.flatnonzero(mask) for budget, mask in zip(budgets, masks, strict=True)}


def train(path: str, images: list[ray.ObjectRef], chosen: np.ndarray, config: Config, seed: int) -> float:
    """Return the test accuracy after training on the samples at `chosen` positions, from `path` if it exists."""
    torch.set_num_threads(1)
    keys = config.evaluate
    settings = training_settings(
        config.train,
        network=keys.network,
        iterations=keys.iterations,
        batch_size=keys.batch_size,
        lr=keys.lr,
        num_tests=1,
    )
    chosen = np.sort(chosen)

    def compute() -> dict[str, float]:
        pool, test = ray.get(images[0])
        coreset = LabelledImages(pool.images[chosen], pool.labels[chosen], pool.sample_ids[chosen])
        return {"accuracy": train_and_test(coreset, test, int(test.labels.max()) + 1, settings, seed=seed)[-1]}

    return kept_or_computed(path, compute)["accuracy"]


def read_test(path: Path, size: int) -> LabelledImages:
    rows = pq.read_table(path)
    images = np.stack([decode_proxy_image(image, size) for image in rows["image"].to_pylist()])
    return LabelledImages(images, rows["label"].to_numpy(), np.arange(rows.num_rows))


if __name__ == "__main__":
    main()
