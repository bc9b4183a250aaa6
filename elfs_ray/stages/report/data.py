"""Write what the page's script needs as JSON: the images that are shown, column by column."""

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from elfs_ray.stages.report.shown import ShownImages


def page_data(shown: ShownImages, thumbnails: Mapping[int, bytes], metrics: Mapping[str, Any], per_page: int) -> str:
    """Return a JSON object that is safe inside a script element of HTML.

    thumbnails: those that the page does not hold elsewhere, by sample_id. per_page: images on a page of the gallery.
    """
    prefix = os.path.commonprefix(shown.uris)  # noqa: RUF071  # of texts: it may end inside a name
    sizes = metrics.get("pseudo_label_sizes", {"before": [], "after": []})
    groups = np.unique(shown.groups[shown.groups >= 0]).tolist()
    content = {
        "total": metrics["counts"]["coreset"],
        "perPage": per_page,
        "prefix": prefix,
        "ids": shown.ids.tolist(),
        "uris": [uri[len(prefix) :] for uri in shown.uris],
        "ranks": shown.ranks.tolist(),
        "groups": shown.groups.tolist(),
        "x": shown.points[:, 0].astype(float).round(4).tolist(),
        "y": shown.points[:, 1].astype(float).round(4).tolist(),
        "kinds": {kind: ids.tolist() for kind, ids in shown.kinds.items()},
        "groupSizes": {group: [sizes["before"][group], sizes["after"][group]] for group in groups},
        "thumbnails": {i: base64.b64encode(image).decode() for i, image in thumbnails.items()},
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # Names are text of strangers: none may end the element that holds them, or open a comment.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
