"""report: write a page and a file of metrics about the run.

Reads   every other table; the originals of the examples in a run that keeps no copies of images
Writes  report.html (one file that opens offline), metrics.json (every number on the page)

Driver memory: a histogram, the ids and images of the examples, and one file of a table at a time.
"""

import base64
import json
from typing import Any

import numpy as np

from elfs_ray.config import BY_COVERAGE, Config
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.embed.blocks import copies_of
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.report import STAGE, ReportResult
from elfs_ray.stages.report.page import render_page
from elfs_ray.stages.select import CoresetResult, SelectResult
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
Image = dict[str, str]  # "uri" and "source", a data: address
Pair = tuple[Image, Image, float]  # a near-duplicate, the image that stands for it, and their similarity
GROUPS = ("hardest", "kept", "easiest")


def run_report(config: Config, run_dir: RunDir) -> ReportResult:
    """Write report.html and metrics.json."""
    metrics = _metrics(config, run_dir)
    images, pairs = _images(config, run_dir)
    page = render_page(metrics, images, pairs, run_dir.uri).encode()
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
        "coresets": {
            table: {name: value for name in CORESET_METRICS if (value := getattr(coreset, name)) is not None}
            for table, coreset in coresets.items()
        },
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


def _images(config: Config, run_dir: RunDir) -> tuple[dict[str, list[Image]], list[Pair]]:
    """Return the images to show for each group, with their uris, and pairs of near-duplicates."""
    first, count = SelectResult.read(run_dir).coresets[schema.CORESET], config.report.images_per_grid
    examples = {group: _spread(getattr(first, f"{group}_examples"), group, count) for group in GROUPS}
    pairs: list[tuple[int, int, float]] = []
    if config.duplicates.threshold is not None:
        pairs = DuplicatesResult.read(run_dir).examples[: config.report.images_per_grid // 2]
    ids_of_pairs = np.array([pair[:2] for pair in pairs], np.int64).ravel()
    wanted = np.unique(np.concatenate([*examples.values(), ids_of_pairs])).astype(np.int64)
    if config.keeps_copies:
        images = dict(_rows(run_dir, schema.PROXY_IMAGES, wanted, schema.IMAGE))
    else:
        images = copies_of(config, run_dir, wanted)
    uris = dict(_rows(run_dir, schema.INDEX, wanted, schema.URI))
    shown = {i: {"uri": uris[i], "source": _data_uri(image)} for i, image in images.items()}
    return (
        {group: [shown[i] for i in ids.tolist() if i in shown] for group, ids in examples.items()},
        [(shown[a], shown[b], similarity) for a, b, similarity in pairs if a in shown and b in shown],
    )


def _spread(sample_ids: list[int], group: str, count: int) -> np.ndarray:
    """Return the first `count` ids; for the group of kept samples, ids spread evenly from hard to easy."""
    ids = np.array(sample_ids, dtype=np.int64)
    if group == "kept" and len(ids) > count:
        return ids[np.linspace(0, len(ids) - 1, count).round().astype(int)]
    return ids[:count]


def _rows(run_dir: RunDir, table: str, sample_ids: np.ndarray, column: str):
    rows = run_dir.read_rows(table, sample_ids, [column])
    return zip(sample_ids.tolist(), rows[column].to_pylist(), strict=True) if len(sample_ids) else ()


def _data_uri(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
