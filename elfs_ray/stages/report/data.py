"""Write what the page's script needs as JSON: the images that are shown, column by column."""

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from elfs_ray.stages.report.lists import ShownList
from elfs_ray.stages.report.shown import ShownImages


def page_data(shown: ShownImages, thumbnails: Mapping[int, bytes], metrics: Mapping[str, Any], per_page: int) -> str:
    """Return a JSON object that is safe inside a script element of HTML.

    thumbnails: those that the page does not hold elsewhere, by sample_id. per_page: images on a page of the gallery.
    """
    prefix = os.path.commonprefix(shown.uris)  # noqa: RUF071  # of texts: it may end inside a name
    sizes = metrics.get("pseudo_label_sizes", {"before": []})["before"]
    groups = np.unique(shown.groups[shown.groups >= 0]).tolist()
    content = {
        "perPage": per_page,
        "prefix": prefix,
        "ids": shown.ids.tolist(),
        "uris": [uri[len(prefix) :] for uri in shown.uris],
        "groups": shown.groups.tolist(),
        "x": shown.points[:, 0].astype(float).round(4).tolist(),
        "y": shown.points[:, 1].astype(float).round(4).tolist(),
        "kinds": _lists_of(shown.kinds),
        "groupSizes": {group: sizes[group] for group in groups},
        "lists": [_list(shown_list, groups) for shown_list in shown.lists],
        "thumbnails": {i: base64.b64encode(image).decode() for i, image in thumbnails.items()},
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # Names are text of strangers: none may end the element that holds them, or open a comment.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _list(shown: ShownList, groups: list[int]) -> dict[str, Any]:
    sizes = dict(enumerate(shown.group_sizes.tolist()))
    return {
        "name": shown.name,
        "total": shown.total,
        "ids": shown.ids.tolist(),
        "ranks": shown.ranks.tolist(),
        "kinds": _lists_of(shown.kinds),
        "groupSizes": {group: sizes.get(group, 0) for group in groups},
    }


def _lists_of(kinds: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    return {kind: ids.tolist() for kind, ids in kinds.items()}
