"""report: what a person looks at.

Reads   every other table
Writes  report.html (one file, opens offline), metrics.json (every figure in it)

The driver holds a histogram, the examples' ids and images, and one file of a table at a time.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elfs_ray.config import Config
from elfs_ray.runtime.progress import format_duration
from elfs_ray.stages.report.charts import STYLE, html_table, line_chart, score_chart, size_chart
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.version import __version__

NUM_BINS = 60
MAX_EPOCHS_SHOWN = 20
PACE = {"images/s": ("images_per_s", ",.0f"), "waiting for data": ("data_wait_share", ".1%")}  # of an epoch
CORESET_FIGURES = ("rows", "hard_fraction", "num_hard", "num_easy", "num_not_drawn", "hard_fraction_evidence")
GROUPS = {
    "hardest": "Hardest, pruned",
    "kept": "Kept, from the hardest to the easiest",
    "easiest": "Easiest, pruned",
}


def run_report(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Write report.html and metrics.json. Returns the bytes of the report."""
    metrics = _metrics(config, run_dir)
    page = _page(config, run_dir, metrics)
    filesystem.write_bytes(run_dir.path(schema.METRICS_FILE), (json.dumps(metrics, indent=2) + "\n").encode())
    filesystem.write_bytes(run_dir.path(schema.REPORT_FILE), page.encode())
    return {"bytes": len(page.encode())}


def _metrics(config: Config, run_dir: RunDir) -> dict[str, Any]:
    stages = {name: run_dir.figures(name) for name in config.stage_names if name != "report"}
    num_clusters = stages["cluster"]["num_clusters"]
    before = _label_sizes(run_dir, schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, num_clusters=num_clusters)
    after = _label_sizes(run_dir, schema.CORESET, num_clusters=num_clusters)
    coresets = stages["select"]["coresets"]
    first = coresets[schema.CORESET]
    return {
        "elfs_ray": __version__,
        "pool": config.pool.uri,
        "budget": config.budget,
        "counts": {
            "pool": stages["index"]["rows"],
            "rejected": stages["embed"]["rejected"],
            "embedded": stages["embed"]["rows"],
            "pruned_hard": first["num_hard"],
            "coreset": first["rows"],
            "pruned_easy": first["num_easy"],
            "not_drawn": first["num_not_drawn"],
        },
        "method": config.select.method,
        "balance": config.select.balance,
        "score": first["score"],
        "hard_side": first["hard_side"],
        "hard_fraction": first["hard_fraction"],
        "coresets": {
            table: {name: figures[name] for name in CORESET_FIGURES if name in figures}
            for table, figures in coresets.items()
        },
        "score_histogram": _histogram(run_dir, first),
        "pseudo_label_sizes": {"before": before.tolist(), "after": after.tolist()},
        "stages": stages,
    }


def _label_sizes(run_dir: RunDir, *table: str, num_clusters: int) -> np.ndarray:
    sizes = np.zeros(num_clusters, dtype=np.int64)
    for rows in run_dir.read_table(*table, columns=[schema.PSEUDO_LABEL]):
        sizes += np.bincount(rows[schema.PSEUDO_LABEL].to_numpy(), minlength=num_clusters)
    return sizes


def _histogram(run_dir: RunDir, coreset: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the pool, and of the first coreset, in equal bins."""
    low, high = coreset["score_min"], coreset["score_max"]
    edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    counts = {schema.SCORES: np.zeros(NUM_BINS, dtype=np.int64), schema.CORESET: np.zeros(NUM_BINS, dtype=np.int64)}
    for table, folder, column in (
        (schema.SCORES, coreset["score_table"], coreset["score"]),
        (schema.CORESET, schema.CORESET, schema.SCORE),
    ):
        for rows in run_dir.read_table(folder, columns=[column]):
            counts[table] += np.histogram(rows[column].to_numpy(), bins=edges)[0]
    return {
        "edges": edges.tolist(),
        "counts": counts[schema.SCORES].tolist(),
        "kept": counts[schema.CORESET].tolist(),
        "hardest_kept": coreset["hardest_kept"],
        "easiest_kept": coreset["easiest_kept"],
    }


def _page(config: Config, run_dir: RunDir, metrics: dict[str, Any]) -> str:
    counts = metrics["counts"]
    seconds = {name: figures["seconds"] for name, figures in metrics["stages"].items()}
    title = f"{counts['coreset']:,} of {counts['pool']:,} images"
    sections = [
        f"<h1>{title}</h1><p class=sub>Coreset of {html.escape(metrics['pool'])}, chosen without labels by elfs_ray "
        f"{metrics['elfs_ray']}. Run directory: {html.escape(run_dir.uri)}</p>",
        html_table(
            "Counts",
            ("", "images", "share of the pool"),
            [(name.replace("_", " "), f"{n:,}", f"{n / counts['pool']:.2%}") for name, n in counts.items()],
        ),
        *_coresets(metrics),
        *_hard_fractions(metrics["coresets"]),
        html_table(
            "Time",
            ("stage", "time"),
            [(name, format_duration(value)) for name, value in seconds.items()]
            + [("total", format_duration(sum(seconds.values())))],
        ),
        f"<h2>Scores ({metrics['score']}, {metrics['hard_side']} is hard)</h2>"
        + score_chart(metrics["score_histogram"])
        + "<p>Pale bars are the pool, dark ones the coreset; lines mark the hardest and the easiest that are kept.</p>",
        "<h2>Pseudo-labels before and after</h2>" + size_chart(metrics["pseudo_label_sizes"]),
        *_pretraining(metrics["stages"].get("pretrain", {}).get("history", ())),
        *_clustering(metrics["stages"]["cluster"]),
        *_training(metrics["stages"]["train"]["history"]),
        *_grids(config, run_dir),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>elfs_ray: {title}</title><style>{STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def _pretraining(history: Sequence[Mapping[str, float]]) -> list[str]:
    """The encoder's training, where the run has trained its own: some epochs as a table, loss and rank over all."""
    if not history:
        return []
    columns = {
        "loss": ("loss", ".4f"),
        "spread": ("spread", ".3f"),
        "effective rank": ("effective_rank", ".1f"),
        **PACE,
    }
    charts = [
        f"<h2>Encoder: {what}, by epoch</h2>" + line_chart([epoch[key] for epoch in history], f"{what} by epoch")
        for key, what in (("loss", "contrastive loss"), ("effective_rank", "effective rank of the embeddings"))
    ]
    return [_epochs("Training the encoder", columns, history), *charts]


def _epochs(title: str, columns: Mapping[str, tuple[str, str]], history: Sequence[Mapping[str, float]]) -> str:
    """A table of at most 20 epochs, evenly spread, the first and the last among them; columns: key and format."""
    shown = np.unique(np.linspace(0, len(history) - 1, MAX_EPOCHS_SHOWN).round().astype(int)).tolist()
    rows = [
        (f"{history[i]['epoch'] + 1:.0f}", *(format(history[i][key], spec) for key, spec in columns.values()))
        for i in shown
    ]
    return html_table(title, ("epoch", *columns), rows)


def _coresets(metrics: dict[str, Any]) -> list[str]:
    """A table of the coresets, where a run has several."""
    coresets = metrics["coresets"]
    if len(coresets) == 1:
        return []
    rows = [
        (table, f"{own['rows']:,}", f"{own['rows'] / metrics['counts']['pool']:.2%}", f"{own['hard_fraction']:.3g}")
        for table, own in coresets.items()
    ]
    return [html_table("Coresets", ("", "images", "share of the pool", "hard fraction"), rows)]


def _hard_fractions(coresets: Mapping[str, Any]) -> list[str]:
    """What speaks for each hard fraction that was not given: every training, or every twentieth estimate."""
    sections = []
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    for table, own in coresets.items():
        evidence = own.get("hard_fraction_evidence")
        if evidence is None:
            continue
        title = f"Hard fraction of {table}: {own['hard_fraction']:g}, by select.hard_fraction={evidence['found_by']}"
        if evidence["found_by"] == "search":
            head = ("hard fraction", f"accuracy on {evidence['held_out']:,} pseudo-labels held out", "")
            tried = [(trial["hard_fraction"], trial["accuracy"]) for trial in evidence["trials"]]
            rows = [(f"{beta:g}", f"{share:.1%}", _mark(beta == own["hard_fraction"])) for beta, share in tried]
        else:
            head = ("hard fraction", "how much easier than the pool", "variance", "risk")
            rows = [
                (f"{risk['hard_fraction']:g}", *(f"{risk[name]:.4f}" for name in ("bias", "variance", "risk")))
                for risk in evidence["risks"]
            ]
        sections.append(html_table(title, head, rows))
    return sections


def _clustering(figures: Mapping[str, Any]) -> list[str]:
    """How the pseudo-labels were made, and what can be said of them without labels."""
    rows = [("made by", figures["method"]), ("clusters", f"{figures['num_clusters']:,}")]
    if "objective" in figures:
        rows.append(("k-means: mean squared distance", f"{figures['objective']:.5f}"))
        rows.append(("k-means: iterations of the best try", f"{figures['iterations']:,}"))
    if "neighbors" in figures:
        search = figures["neighbors"]
        recall = f", {search['recall']:.1%} of the exact ones found" if "recall" in search else ""
        rows.append(("nearest neighbours", f"{search['num_neighbors']} each, {search['search']}{recall}"))
        rows.append(("neighbours that share a sample's pseudo-label", f"{figures['neighbor_purity']:.1%}"))
    sections = [html_table("How the pseudo-labels were made", ("", ""), rows)]
    if figures.get("num_clusters_evidence"):
        tried = [
            (
                f"{row['num_clusters']:.0f}",
                f"{row['silhouette']:.4f}",
                _mark(row["num_clusters"] == figures["num_clusters"]),
            )
            for row in figures["num_clusters_evidence"]
        ]
        sections.append(html_table("Number of clusters, estimated", ("clusters", "silhouette", ""), tried))
    if "temi" in figures:
        sections += _temi_heads(figures["temi"])
    return sections


def _temi_heads(temi: Mapping[str, Any]) -> list[str]:
    """Every head's loss and agreement with the chosen one, best first, and the lowest loss over the epochs."""
    losses, agreement = temi["head_losses"], temi["head_agreement"]
    rows = [
        (str(head), f"{losses[head]:.4f}", f"{agreement[head]:.1%}", _mark(head == temi["head"]))
        for head in np.argsort(losses, kind="stable").tolist()
    ]
    return [
        html_table("TEMI heads", ("head", "loss", "samples labelled as by the chosen head", ""), rows),
        "<h2>TEMI: lowest loss of a head, by epoch</h2>"
        + line_chart(temi["loss_history"], "Lowest head loss by epoch"),
    ]


def _training(history: Sequence[Mapping[str, float]]) -> list[str]:
    """The proxy's training: some epochs as a table, accuracy against pseudo-labels over all of them."""
    if not history:
        return []
    columns = {
        "loss": ("loss", ".4f"),
        "agrees with pseudo-labels": ("accuracy", ".1%"),
        **PACE,
        "recording": ("recorder_share", ".2%"),
    }
    accuracies = [epoch["accuracy"] for epoch in history]
    return [
        _epochs("Training the proxy", columns, history),
        "<h2>Share of samples whose pseudo-label the proxy learned, by epoch</h2>"
        + line_chart(accuracies, "Accuracy against pseudo-labels by epoch"),
    ]


def _mark(is_chosen: bool) -> str:
    return "chosen" if is_chosen else ""


def _grids(config: Config, run_dir: RunDir) -> list[str]:
    first = run_dir.figures("select")["coresets"][schema.CORESET]
    examples = {group: _spread(first[f"{group}_examples"], group, config.report.images_per_grid) for group in GROUPS}
    wanted = np.unique(np.concatenate(list(examples.values()))).astype(np.int64)
    images = dict(_rows(run_dir, schema.PROXY_IMAGES, wanted, schema.IMAGE))
    uris = dict(_rows(run_dir, schema.INDEX, wanted, schema.URI))
    sections = []
    for group, title in GROUPS.items():
        cells = "".join(_figure(images[i], uris[i]) for i in examples[group].tolist())
        sections.append(f"<h2>{title}</h2><div class=grid>{cells or '<p>none</p>'}</div>")
    return sections


def _spread(sample_ids: list[int], group: str, count: int) -> np.ndarray:
    """The first `count` ids, of the kept ones as many spread over the window."""
    ids = np.array(sample_ids, dtype=np.int64)
    if group == "kept" and len(ids) > count:
        return ids[np.linspace(0, len(ids) - 1, count).round().astype(int)]
    return ids[:count]


def _rows(run_dir: RunDir, table: str, sample_ids: np.ndarray, column: str):
    rows = run_dir.read_rows(table, sample_ids, [column])
    return zip(sample_ids.tolist(), rows[column].to_pylist(), strict=True) if len(sample_ids) else ()


def _figure(image: bytes, uri: str) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    name = html.escape(uri, quote=True)
    return f'<img src="data:image/{kind};base64,{base64.b64encode(image).decode()}" alt="{name}" title="{name}">'
