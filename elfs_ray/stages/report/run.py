"""report: write a page and a file of metrics about the run.

Reads   every other table; the originals of the images that it shows, in a run that keeps no copies of images
Writes  report.html (one file that opens offline, under 5 MB), metrics.json (every number on the page)

Driver memory: a histogram, one file of a table at a time, and what shown.py and thumbnails.py name.
"""

import base64
import json
import time
from typing import Any

import numpy as np

from elfs_ray.config import BY_COVERAGE, DIGEST, Config, name_in_tables
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.report import STAGE, ReportResult
from elfs_ray.stages.report.data import page_data
from elfs_ray.stages.report.lists import EASY, HARD
from elfs_ray.stages.report.page import render_page
from elfs_ray.stages.report.shown import collect_images
from elfs_ray.stages.report.thumbnails import make_thumbnails
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.select.kept_coresets import list_coresets
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.version import __version__

NUM_BINS = 60
CORESET_METRICS = (
    "rows",
    "hard_fraction",
    "num_hard",
    "num_easy",
    "num_not_drawn",
    "hard_fraction_evidence",
    "coverage",
)
UNSCORED = (*BY_COVERAGE, "random")  # methods whose scores say nothing about how hard an image is
# A page has 5 MB at most. Base64 makes 4 bytes of 3; names, points, tables and the script take less than 1.5 MB.
THUMBNAIL_BYTES = 2_600_000
THUMBNAIL_SECONDS = 25.0
LARGE_SIDE, SMALL_SIDE = 112, 64  # pixels of the long side
MAX_LARGE = 600  # larger pictures leave room for fewer


def run_report(config: Config, run_dir: RunDir) -> ReportResult:
    """Write report.html and metrics.json."""
    metrics = _metrics(config, run_dir)
    page = _render(config, run_dir, metrics)
    filesystem.write_bytes(run_dir.path(schema.METRICS_FILE), (json.dumps(metrics, indent=2) + "\n").encode())
    filesystem.write_bytes(run_dir.path(schema.REPORT_FILE), page)
    return ReportResult(len(page))


def _metrics(config: Config, run_dir: RunDir) -> dict[str, Any]:
    markers = [run_dir.complete_marker(name) for name in STAGE.inputs(config)]
    embedded = EmbedResult.read(run_dir)
    selected = SelectResult.read(run_dir)
    coresets = selected.coresets
    first = coresets[schema.CORESET]
    optional: dict[str, Any] = {}
    if config.select.method not in UNSCORED:
        optional["score_histogram"] = _histogram(run_dir, first)
    if config.needs_clusters:
        optional["pseudo_label_sizes"] = _sizes_before_and_after(run_dir)
    if accuracies := _accuracies(config, run_dir):
        optional["test_accuracy"] = accuracies
        optional["name_in_test_accuracy"] = name_in_tables(config.select.method)
    return {
        "elfs_ray": __version__,
        "pool": ", ".join(config.pool.uris),
        "budget": config.budget,
        "counts": {
            "pool": IndexResult.read(run_dir).rows,
            "rejected": embedded.rejected,
            "embedded": embedded.rows,
            "pruned_hard": first.num_hard,
            "coreset": first.rows,
            "pruned_easy": first.num_easy,
            "not_sampled": first.num_not_drawn,
            **(selected.left_out or {}),
        },
        "method": config.select.method,
        "balance": config.select.balance,
        "score": first.score,
        "hard_side": first.hard_side,
        "hard_fraction": first.hard_fraction,
        "coresets": {table: _coreset_metrics(coreset) for table, coreset in coresets.items()},
        "later_selections": _later_selections(run_dir),
        **optional,
        "stages": {
            marker.stage: {
                **marker.result,
                "seconds": marker.seconds,
                "versions": marker.versions,
                "tables": marker.outputs,
            }
            for marker in markers
        },
    }


def _coreset_metrics(coreset: CoresetResult) -> dict[str, Any]:
    return {name: value for name in CORESET_METRICS if (value := getattr(coreset, name)) is not None}


def _later_selections(run_dir: RunDir) -> dict[str, dict[str, Any]]:
    """Return the metrics of each coreset below coresets/, and the keys in which it differs from the run."""
    keys = run_dir.complete_marker(SelectResult.stage).config
    return {
        coreset.name: {
            "text_file": coreset.text_file,
            "method": coreset.marker.config["select.method"],
            "keys": {
                key: value
                for key, value in coreset.marker.config.items()
                if not key.endswith(DIGEST) and keys.get(key) != value
            },
            "left_out": coreset.marker.result.get("left_out") or {},
            **_coreset_metrics(coreset.result),
        }
        for coreset in list_coresets(run_dir)
        if coreset.is_later
    }


def _accuracies(config: Config, run_dir: RunDir) -> dict[str, float]:
    """Return the mean test accuracy of each selection of the first budget; none if this coreset was not evaluated."""
    evaluated = _written_at(run_dir.path(schema.EVALUATE_DIR), schema.RESULTS_FILE)
    # Older results are those of a coreset that was replaced.
    if evaluated is None or evaluated < (_written_at(run_dir.path("select"), schema.SUCCESS_FILE) or 0):
        return {}
    rows = filesystem.read_table(run_dir.path(schema.EVALUATE_DIR, schema.RESULTS_FILE)).to_pylist()
    rows = [row for row in rows if row["budget"] == str(config.budgets[0])]
    return {
        name: float(np.mean([row["last_accuracy"] for row in rows if row["selection"] == name]))
        for name in dict.fromkeys(row["selection"] for row in rows)
    }


def _written_at(folder: str, name: str) -> int | None:
    """Return when a file was last written, in nanoseconds, None if there is none."""
    times = [info.mtime_ns for info in filesystem.list_files(folder) if info.base_name == name]
    return times[0] if times else None


def _sizes_before_and_after(run_dir: RunDir) -> dict[str, list[int]]:
    num_clusters = ClusterResult.read(run_dir).num_clusters
    tables = {"before": (schema.CLUSTERS, schema.PSEUDO_LABELS_DIR), "after": (schema.CORESET,)}
    return {name: _label_sizes(run_dir, *table, num_clusters=num_clusters).tolist() for name, table in tables.items()}


def _label_sizes(run_dir: RunDir, *table: str, num_clusters: int) -> np.ndarray:
    sizes = np.zeros(num_clusters, dtype=np.int64)
    for rows in run_dir.read_table(*table, columns=[schema.PSEUDO_LABEL]):
        sizes += np.bincount(rows[schema.PSEUDO_LABEL].to_numpy(), minlength=num_clusters)
    return sizes


def _histogram(run_dir: RunDir, coreset: CoresetResult) -> dict[str, Any]:
    """Return histograms of the scores of the pool and of the first coreset, in equal bins."""
    # If all scores are equal, the range is widened: bins need a width.
    low, high = coreset.score_min, coreset.score_max
    edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    counts = {schema.SCORES: np.zeros(NUM_BINS, dtype=np.int64), schema.CORESET: np.zeros(NUM_BINS, dtype=np.int64)}
    for table, folder, column in (
        (schema.SCORES, coreset.score_table, coreset.score),
        (schema.CORESET, schema.CORESET, schema.SCORE),
    ):
        for rows in run_dir.read_table(folder, columns=[column]):
            counts[table] += np.histogram(rows[column].to_numpy(), bins=edges)[0]
    return {
        "edges": edges.tolist(),
        "counts": counts[schema.SCORES].tolist(),
        "kept": counts[schema.CORESET].tolist(),
        "hardest_kept": coreset.hardest_kept,
        "easiest_kept": coreset.easiest_kept,
    }


def _render(config: Config, run_dir: RunDir, metrics: dict[str, Any]) -> bytes:
    """Return the page. Its size is bounded by the bytes of its thumbnails and of its names, whatever the pool."""
    shown = collect_images(config, run_dir)
    first = shown.lists[0]
    uris = dict(zip(shown.ids.tolist(), shown.uris, strict=True))
    count = config.report.images_per_grid
    grids = {
        "kept": first.ids[:count].tolist(),
        "hardest": first.kinds[HARD][:count].tolist(),
        "easiest": first.kinds[EASY][:count].tolist(),
    }
    pairs = _pairs(config, run_dir, set(uris))
    in_pairs = [i for pair in pairs for i in pair[:2]]
    thumbnails = _thumbnails(config, run_dir, uris, *shown.by_importance({**grids, "pairs": in_pairs}))
    image = {i: {"id": i, "uri": uris[i], "source": _data_uri(data)} for i, data in thumbnails.items()}
    images = {name: [image[i] for i in ids if i in image] for name, ids in grids.items()}
    in_grids = {i for ids in (*grids.values(), in_pairs) for i in ids}
    data = page_data(shown, {i: image for i, image in thumbnails.items() if i not in in_grids}, metrics, count)
    images_of_pairs = [(image[a], image[b], similarity) for a, b, similarity in pairs if a in image and b in image]
    names = [shown_list.name for shown_list in shown.lists]
    counts = (len(thumbnails), len(shown.ids))
    return render_page(metrics, images, images_of_pairs, data, *counts, names, run_dir.uri).encode()


def _pairs(config: Config, run_dir: RunDir, on_page: set[int]) -> list[tuple[int, int, float]]:
    """Return near-duplicates to show, each with the image that stands for it and their similarity."""
    if config.duplicates.threshold is None:
        return []
    examples = DuplicatesResult.read(run_dir).examples[: config.report.images_per_grid // 2]
    return [pair for pair in examples if on_page.issuperset(pair[:2])]


def _thumbnails(
    config: Config, run_dir: RunDir, uris: dict[int, str], first: list[int], later: list[int]
) -> dict[int, bytes]:
    """Return thumbnails by sample_id, as many as fit: those of `first` are larger unless there are many."""
    thumbnails: dict[int, bytes] = {}
    deadline = time.monotonic() + THUMBNAIL_SECONDS
    for ids, side in ((first, LARGE_SIDE if len(first) <= MAX_LARGE else SMALL_SIDE), (later, SMALL_SIDE)):
        thumbnails |= make_thumbnails(
            config,
            run_dir,
            {i: uris[i] for i in ids},
            side=side,
            max_bytes=THUMBNAIL_BYTES - sum(map(len, thumbnails.values())),
            max_seconds=deadline - time.monotonic(),
        )
    return thumbnails


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
