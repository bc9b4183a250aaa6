"""The parts that the report's page is made of: tables, charts as SVG, and the style."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHART_WIDTH, CHART_HEIGHT = 760, 220


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table; cells are escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<h2>{title}</h2><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def score_chart(histogram: Mapping[str, Any]) -> str:
    """Histogram of the pool's scores (pale) and of the coreset's (dark), with lines at the hardest and easiest kept."""
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


def size_chart(sizes: Mapping[str, list[int]]) -> str:
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


def line_chart(values: Sequence[float], label: str) -> str:
    """A value an epoch, joined by a line; the lowest and the highest are written at the left."""
    low, high = min(values), max(values)
    top, bottom = 16, CHART_HEIGHT / 2
    steps = max(len(values) - 1, 1)

    def y(value: float) -> float:
        return bottom - (value - low) / ((high - low) or 1.0) * (bottom - top)

    points = " ".join(f"{i / steps * CHART_WIDTH:.1f},{y(value):.1f}" for i, value in enumerate(values))
    texts = (
        f"<text x=0 y={top - 4}>{high:.4g}</text><text x=0 y={bottom + 14}>{low:.4g}</text>"
        f"<text x={CHART_WIDTH} y={bottom + 14} text-anchor=end>epoch {len(values)}</text>"
    )
    return _svg(f"<polyline points='{points}' class=curve />" + texts, bottom + 20, label)


def _svg(content: str, height: float, label: str) -> str:
    return f"<svg viewBox='0 0 {CHART_WIDTH} {height}' role=img aria-label='{label}'>{content}</svg>"


STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--pale:#b9c4cf;--dark:#1b6ca8;--line:#d5483a;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#dde5ec;--pale:#4a5763;--dark:#5aa9e6;--line:#ff8a7a;--back:#14191f}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:800px;margin:2rem auto;padding:0 1rem}h1{margin-bottom:0}h2{margin:2rem 0 .5rem;font-size:1.1rem}
.sub{margin-top:.2rem;opacity:.75;overflow-wrap:anywhere}table{border-collapse:collapse}
td,th{padding:.15rem 1.2rem .15rem 0;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--ink)}.kept{fill:var(--dark)}.pruned{fill:var(--pale)}
.curve{fill:none;stroke:var(--dark);stroke-width:2}
line{stroke:var(--line);stroke-width:1.5;stroke-dasharray:4 3}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(64px,1fr));gap:4px}
.grid img{width:100%;aspect-ratio:1;object-fit:cover;image-rendering:auto;border-radius:3px}
"""
