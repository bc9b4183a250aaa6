"""Render the report's page: one HTML file, with its images inside, that opens offline."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from elfs_ray.config.select import USES_HARD_FRACTION
from elfs_ray.runtime.progress import format_duration
from elfs_ray.stages.report.charts import (
    CHART_HEIGHT,
    CHART_WIDTH,
    LINE_HEIGHT,
    MAX_GROUPS,
    line_chart,
    score_chart,
    size_chart,
)
from elfs_ray.storage import schema

TEMPLATE = Path(__file__).with_name("page.html.j2")
STYLE = TEMPLATE.with_name("page.css")
SCRIPTS = [TEMPLATE.with_name(name) for name in ("page.js", "map.js", "controls.js")]
MAX_EPOCHS_SHOWN = 20


def render_page(
    metrics: Mapping[str, Any],
    images: Mapping[str, Sequence[Mapping[str, Any]]],
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], float]],
    data: str,
    num_thumbnails: int,
    num_shown: int,
    shown_lists: Sequence[str],
    run_uri: str,
) -> str:
    """Return the page as HTML.

    metrics: the content of metrics.json. images: the images to show for "hardest", "kept" and "easiest", each with its
    "id", its "uri" and its "source", a data: address. pairs: near-duplicates, each with the image that stands for it
    and their similarity. data: what the script reads, as JSON (data.py). num_thumbnails of the num_shown images of the
    page have a thumbnail. shown_lists: the names of the coresets that map and gallery can show.
    """
    script = "".join(path.read_text() for path in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Uris and paths are text that others have written, so everything is escaped. A missing metric raises
    # UndefinedError instead of leaving a gap on the page.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": format_duration,
        "thousands": lambda number: f"{number:,}",
        "percent": lambda share, digits=1: f"{share:.{digits}%}",
        "fixed": lambda number, digits: f"{number:,.{digits}f}",
        "shown_epochs": _shown_epochs,
        "typed": lambda value: value if isinstance(value, str) else json.dumps(value, separators=(",", ":")),
    }
    return environment.get_template(TEMPLATE.name).render(
        metrics=metrics,
        images=images,
        pairs=pairs,
        # The only texts that are not escaped: our files, and JSON that holds none of HTML's characters.
        style=Markup(STYLE.read_text()),
        script=Markup(script),
        data=Markup(data),
        script_hash=f"sha256-{digest}",
        num_thumbnails=num_thumbnails,
        num_shown=num_shown,
        run_uri=run_uri,
        shown_lists=shown_lists,
        takes_hard_fraction=USES_HARD_FRACTION,
        text_files={table: schema.coreset_text_file(table) for table in metrics["coresets"]},
        uses_hard_fraction=metrics["method"] in USES_HARD_FRACTION,
        score_chart=score_chart(metrics["score_histogram"]) if "score_histogram" in metrics else None,
        size_chart=size_chart(metrics["pseudo_label_sizes"]) if "pseudo_label_sizes" in metrics else None,
        max_groups=MAX_GROUPS,
        line_chart=line_chart,
        ranked_heads=_ranked_heads(metrics["stages"].get("cluster", {}).get("temi")),
        chart={"width": CHART_WIDTH, "height": CHART_HEIGHT, "line_height": LINE_HEIGHT},
    )


def _shown_epochs(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return at most 20 epochs, evenly spread from the first to the last."""
    positions = np.unique(np.linspace(0, len(history) - 1, MAX_EPOCHS_SHOWN).round().astype(int))
    return [history[position] for position in positions.tolist()]


def _ranked_heads(temi: Mapping[str, Any] | None) -> list[tuple[float, int]]:
    """Return (loss, head) of every TEMI head, the lowest loss first."""
    return sorted((loss, head) for head, loss in enumerate(temi["head_losses"])) if temi else []
