"""Measure labelling in rounds: two rounds of N/2 vs. one of N by a linear probe, and lists of images for a large pool.

    python benchmarks/rounds.py --data FOLDER
    python benchmarks/rounds.py --million [--only random]
    python benchmarks/rounds.py --quick

FOLDER has imagenette/ (WebDataset tars: jpg, cls). Of 2,208 photographs some are chosen by coverage, at once and in two
rounds: as one part, where both give the same list, and in four parts, as a large pool is divided. One line of JSON for
each number of labels, with the accuracies in % of a probe on 736 others; random: mean and standard deviation of 5
draws. --million measures stage select on a million made-up points, of which 10,000 are labelled and 100,000 excluded,
vs. the same without lists. Memory is the peak of all processes beyond their memory when idle, with Ray's object store.
--quick takes 1,000 digits and 20,000 points.
"""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from cpu_track import NUM_DRAWS
from duplicates import embed
from helpers.pools import read_parquet, read_set
from helpers.reporting import command_line, emit
from helpers.tracks import write_digits
from kmeans import ROWS_PER_FILE, unit, write_embeddings
from PIL import Image
from selection import Peak, memory_of_ray

from elfs_ray.config import load_config
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.greedi import Rows
from elfs_ray.methods.training.linear_probe import fit_linear_probe
from elfs_ray.runtime.cluster import connect
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select.run import run_select
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir

LABELS = (20, 50, 100)
PARTS = 4


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--million", action="store_true", help="measure the lists on a million made-up points")
    parser.add_argument("--only", default="random,coverage", help="methods of --million")
    parser.add_argument("--quick", action="store_true", help="smaller pools; under 45 s on 2 cores")
    arguments = parser.parse_args()
    if arguments.data is None and not (arguments.quick or arguments.million):
        parser.error("give --data, a folder with the data sets, or --million or --quick")
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            images, labels = read_parquet(write_digits(Path(folder))[0], 1_000)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in images]).reshape(len(images), -1)
        compare(unit(pixels), labels)
        measure_lists(["random"], 20_000)
        return
    if arguments.data is not None:
        (images, labels), _ = read_set(arguments.data / "imagenette")
        compare(embed([Image.open(io.BytesIO(data)).convert("RGB") for data in images]), labels)
    if arguments.million:
        measure_lists(arguments.only.split(","), 1_000_000)


def compare(everything: np.ndarray, labels: np.ndarray) -> None:
    """Print the accuracy of one round and of two, in one part and in four; a quarter of the images are tested on."""
    num_pool = 3 * len(everything) // 4
    embeddings, test_embeddings = np.split(everything, [num_pool])
    classes, test_classes = np.split(labels.astype(np.int64), [num_pool])
    rows = Rows(embeddings, np.arange(num_pool), None)

    def accuracy(ids: np.ndarray) -> float:
        probe = fit_linear_probe(embeddings[ids], classes[ids], int(classes.max()) + 1)
        return round(100 * probe.accuracy(test_embeddings, test_classes), 1)

    for num_labels in LABELS:
        draws = [
            accuracy(np.random.default_rng(seed).permutation(len(embeddings))[:num_labels]) for seed in range(NUM_DRAWS)
        ]
        spread = (np.mean(draws), np.std(draws, ddof=1))
        line: dict = {"labels": num_labels, "random": [round(float(value), 1) for value in spread]}
        for num_parts in (1, PARTS):
            first = choose(rows, num_labels // 2, num_parts, None)
            second = choose(rows, num_labels - len(first), num_parts, rows.among(first))
            at_once, in_rounds = choose(rows, num_labels, num_parts, None), np.concatenate([first, second])
            assert len(np.unique(in_rounds)) == num_labels
            line[f"parts_{num_parts}"] = {
                "one_round": accuracy(at_once),
                "two_rounds": accuracy(in_rounds),
                "images_in_both": len(np.intersect1d(at_once, in_rounds)),
            }
        print(json.dumps(line), flush=True)


def choose(rows: Rows, count: int, num_parts: int, labelled: Rows | None) -> np.ndarray:
    """Return the ids that coverage chooses, in order, from a pool divided into parts."""
    if num_parts == 1:
        return rows.sample_ids[greedi.select(rows, count, labelled)[0]]
    parts = np.array_split(rows.sample_ids, num_parts)
    candidates = -(-len(rows.sample_ids) // num_parts // 4)
    nominees = [greedi.nominate(rows.among(part), candidates, -(-count // num_parts), labelled) for part in parts]
    return greedi.merge(nominees, rows, count, labelled).sample_ids


def measure_lists(methods: list[str], num_samples: int) -> None:
    """Measure stage select with and without lists of labelled and excluded images, on two CPUs."""
    connect("local", num_cpus=2, object_store_memory=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        write_embeddings(run_dir, num_samples)
        write_index(run_dir, num_samples)
        ids = np.random.default_rng(0).permutation(num_samples)
        labelled, excluded = (f"{folder}/{name}.txt" for name in ("labelled", "excluded"))
        Path(labelled).write_text("".join(map("/pool/{:09d}.jpg\n".format, ids[: num_samples // 100])))
        Path(excluded).write_text("".join(map("/pool/{:09d}.jpg\n".format, ids[-num_samples // 10 :])))
        lists = (f"select.labelled={labelled}", f"select.exclude={excluded}")
        idle = memory_of_ray()
        for method in methods:
            keys = [f"run_dir={folder}", "pool.uri=/pool", f"budget={num_samples // 100}", f"select.method={method}"]
            keys += ["cluster.num_clusters=2"]
            plain, with_lists = (measure_select(run_dir, [*keys, *more]) for more in ((), lists))
            title = f"{method} selects {num_samples // 100:,} of {num_samples:,}, 1% labelled and 10% excluded"
            emit(title, with_lists.seconds, "s", "without lists", plain.seconds, less_is_better=True)
            peaks = [(peak.peak_bytes - idle) / 2**20 for peak in (with_lists, plain)]
            emit(f"memory: {title}", peaks[0], "MiB", "without lists", peaks[1], less_is_better=True)


def measure_select(run_dir: RunDir, keys: list[str]) -> Peak:
    filesystem.delete(run_dir.path(schema.CORESET))
    with Peak(memory_of_ray) as peak:
        run_select(load_config(None, keys), run_dir)
    return peak


def write_index(run_dir: RunDir, num_samples: int) -> None:
    for first in range(0, num_samples, ROWS_PER_FILE):
        ids = np.arange(first, min(first + ROWS_PER_FILE, num_samples))
        uris = list(map("/pool/{:09d}.jpg".format, ids))
        table = pa.table([ids, uris, pa.nulls(len(ids), pa.int32())], schema=schema.INDEX_SCHEMA)
        filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(int(ids[0]), int(ids[-1]))), table)
    run_dir.mark_complete(Marker("index", {}, {}, IndexResult(num_samples, 1, "folder", []).to_json()))


if __name__ == "__main__":
    main()
