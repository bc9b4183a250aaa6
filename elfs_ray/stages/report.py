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

from elfs_ray.config import STAGE_NAMES, Config
from elfs_ray.progress import format_duration
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.version import __version__

NUM_BINS = 60
CHART_WIDTH, CHART_HEIGHT = 760, 220
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
    stages = {name: run_dir.figures(name) for name in STAGE_NAMES if name != "report"}
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
            table: {name: figures[name] for name in ("rows", "hard_fraction", "num_hard", "num_easy", "num_not_drawn")}
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
        _table(
            "Counts",
            ("", "images", "share of the pool"),
            [(name.replace("_", " "), f"{n:,}", f"{n / counts['pool']:.2%}") for name, n in counts.items()],
        ),
        *_coresets(metrics),
        _table(
            "Time",
            ("stage", "time"),
            [(name, format_duration(value)) for name, value in seconds.items()]
            + [("total", format_duration(sum(seconds.values())))],
        ),
        f"<h2>Scores ({metrics['score']}, {metrics['hard_side']} is hard)</h2>"
        + _score_chart(metrics["score_histogram"])
        + "<p>Pale bars are the pool, dark ones the coreset; lines mark the hardest and the easiest that are kept.</p>",
        "<h2>Pseudo-labels before and after</h2>" + _size_chart(metrics["pseudo_label_sizes"]),
        *_grids(config, run_dir),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>elfs_ray: {title}</title><style>{_STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def _coresets(metrics: dict[str, Any]) -> list[str]:
    """A table of the coresets, where a run has several."""
    coresets = metrics["coresets"]
    if len(coresets) == 1:
        return []
    rows = [
        (table, f"{own['rows']:,}", f"{own['rows'] / metrics['counts']['pool']:.2%}", f"{own['hard_fraction']:.3g}")
        for table, own in coresets.items()
    ]
    return [_table("Coresets", ("", "images", "share of the pool", "hard fraction"), rows)]


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<h2>{title}</h2><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _score_chart(histogram: dict[str, Any]) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    cuts = sorted((histogram["hardest_kept"], histogram["easiest_kept"]))
    low, high = edges[0], edges[-1]
    top = max(max(counts), 1)
    width = CHART_WIDTH / len(counts)

    def x(value: float) -> float:
        return (value - low) / (high - low) * CHART_WIDTH

    bars = []
    for css, heights in (("pruned", counts), ("kept", histogram["kept"])):
        for position, count in enumerate(heights):
            height = count / top * CHART_HEIGHT
            bars.append(
                f"<rect x={position * width:.1f} y={CHART_HEIGHT - height:.1f} width={width - 1:.1f} "
                f"height={height:.1f} class={css}><title>{edges[position]:.3g} to {edges[position + 1]:.3g}: "
                f"{count:,}</title></rect>"
            )
    lines = [
        f"<line x1={x(cut):.1f} x2={x(cut):.1f} y1=0 y2={CHART_HEIGHT} /><text x={x(cut) + 3:.1f} y=12>{cut:.3g}</text>"
        for cut in cuts
    ]
    ends = (
        f"<text x=0 y={CHART_HEIGHT + 16}>{low:.3g}</text>"
        f"<text x={CHART_WIDTH} y={CHART_HEIGHT + 16} text-anchor=end>{high:.3g}</text>"
    )
    return _svg("".join(bars) + "".join(lines) + ends, CHART_HEIGHT + 22, "Histogram of scores with both cuts")


def _size_chart(sizes: dict[str, list[int]]) -> str:
    """Share of each pseudo-label in the pool (pale) and in the coreset (dark), largest first."""
    before, after = np.array(sizes["before"], float), np.array(sizes["after"], float)
    before, after = before / max(before.sum(), 1), after / max(after.sum(), 1)
    order = np.argsort(-before, kind="stable")
    top = max(before.max(), after.max())
    width = CHART_WIDTH / len(order)
    bars = []
    for position, label in enumerate(order):
        for share, css, offset in ((before[label], "pruned", 0.0), (after[label], "kept", width * 0.45)):
            height = share / top * CHART_HEIGHT
            bars.append(
                f"<rect x={position * width + offset:.1f} y={CHART_HEIGHT - height:.1f} width={width * 0.42:.2f} "
                f"height={height:.1f} class={css}><title>pseudo-label {label}: {share:.2%}</title></rect>"
            )
    legend = "<p>Share of each pseudo-label, largest first: pale in the pool, dark in the coreset.</p>"
    return _svg("".join(bars), CHART_HEIGHT, "Share of each pseudo-label before and after selection") + legend


def _svg(content: str, height: float, label: str) -> str:
    return f"<svg viewBox='0 0 {CHART_WIDTH} {height}' role=img aria-label='{label}'>{content}</svg>"


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


_STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--pale:#b9c4cf;--dark:#1b6ca8;--line:#d5483a;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#dde5ec;--pale:#4a5763;--dark:#5aa9e6;--line:#ff8a7a;--back:#14191f}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:800px;margin:2rem auto;padding:0 1rem}h1{margin-bottom:0}h2{margin:2rem 0 .5rem;font-size:1.1rem}
.sub{margin-top:.2rem;opacity:.75;overflow-wrap:anywhere}table{border-collapse:collapse}
td,th{padding:.15rem 1.2rem .15rem 0;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--ink)}.kept{fill:var(--dark)}.pruned{fill:var(--pale)}
line{stroke:var(--line);stroke-width:1.5;stroke-dasharray:4 3}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(64px,1fr));gap:4px}
.grid img{width:100%;aspect-ratio:1;object-fit:cover;image-rendering:auto;border-radius:3px}
"""
