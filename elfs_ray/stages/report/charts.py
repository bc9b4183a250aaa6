"""Compute the marks of the report's charts in the units of an SVG; page.html.j2 draws them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHART_WIDTH, CHART_HEIGHT = 760, 220
LINE_HEIGHT = 110
MAX_GROUPS = 150  # more bars would be thinner than a pixel or two


def score_chart(histogram: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bars of the scores of the pool and of the coreset, and marks at the first and last score kept."""
    edges, counts, kept = histogram["edges"], histogram["counts"], histogram["kept"]
    low, high = edges[0], edges[-1]
    top = max(*counts, 1)
    width = CHART_WIDTH / len(counts)
    bars = []
    for css, heights in (("pool", counts), ("chosen", kept)):
        for position, count in enumerate(heights):
            title = (
                f"score {edges[position]:.3g} to {edges[position + 1]:.3g}: "
                f"{kept[position]:,} of {counts[position]:,} images chosen"
            )
            bars.append(_bar(position * width, width - 1, count / top, css, title))
    cuts = [
        {"x": (score - low) / (high - low) * CHART_WIDTH, "text": f"{score:.3g}"}
        for score in sorted((histogram["hardest_kept"], histogram["easiest_kept"]))
    ]
    return {"bars": bars, "cuts": cuts, "low": f"{low:.3g}", "high": f"{high:.3g}"}


def size_chart(sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the bars of each pseudo-label's share of the pool and of the coreset, the largest 150 in the pool."""
    before, after = np.array(sizes["before"], float), np.array(sizes["after"], float)
    before, after = before / max(before.sum(), 1), after / max(after.sum(), 1)
    top = max(before.max(), after.max())
    largest = np.argsort(-before, kind="stable")[:MAX_GROUPS]
    width = CHART_WIDTH / largest.size
    bars = []
    for position, label in enumerate(largest.tolist()):
        title = f"group {label}: {before[label]:.2%} of the pool, {after[label]:.2%} of the coreset"
        left = position * width
        bars.append(_bar(left, width * 0.42, before[label] / top, "pool", title))
        bars.append(_bar(left + width * 0.45, width * 0.42, after[label] / top, "chosen", title))
    return {"bars": bars, "top": f"{top:.1%}"}


def line_chart(values: Sequence[float]) -> dict[str, Any]:
    """Return the points of a line through one value for each epoch, and the labels of its lowest and highest value."""
    low, high = min(values), max(values)
    top, bottom = 16, LINE_HEIGHT
    steps = max(len(values) - 1, 1)
    points = " ".join(
        f"{i / steps * CHART_WIDTH:.1f},{bottom - (value - low) / ((high - low) or 1.0) * (bottom - top):.1f}"
        for i, value in enumerate(values)
    )
    return {"points": points, "low": f"{low:.4g}", "high": f"{high:.4g}", "epochs": len(values)}


def _bar(x: float, width: float, share: float, css: str, title: str) -> dict[str, Any]:
    """Return a bar that stands on the chart's floor and fills `share` of its height."""
    height = share * CHART_HEIGHT
    return {"x": x, "y": CHART_HEIGHT - height, "width": width, "height": height, "css": css, "title": title}
