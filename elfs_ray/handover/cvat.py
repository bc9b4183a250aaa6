"""CVAT: a dataset manifest, which lists images on the server's share or in a cloud storage in a predefined order."""

import json
import posixpath

from elfs_ray.config import ConfigError
from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.originals import read_originals
from elfs_ray.handover.places import common_folder, refuse_containers, relative_places
from elfs_ray.storage import filesystem

HEADER = ({"version": "1.1"}, {"type": "images"})


def write_cvat(coreset: Coreset, out: str, root: str | None) -> None:
    """Write a manifest with the name and the size in pixels of each image; the metadata is in `meta`.

    root: the folder or bucket that is the top of the share or cloud storage; by default the deepest folder that holds
    all images. Reads every image.
    """
    refuse_containers(coreset, "CVAT")
    if any(place.startswith(("http://", "https://")) for place in coreset.places):
        raise ConfigError("CVAT orders no images by their URLs: map them to a path on its share or to a bucket")
    names = relative_places(coreset, root or common_folder(coreset.places))
    lines = [json.dumps(line) for line in HEADER]
    for name, original, metadata in zip(names, read_originals(coreset), coreset.metadata(), strict=True):
        stem, extension = posixpath.splitext(name)
        entry = {"name": stem, "extension": extension, "width": original.width, "height": original.height}
        lines.append(json.dumps({**entry, "meta": {"related_images": [], **metadata}}, ensure_ascii=False))
    filesystem.write_bytes(out, ("\n".join(lines) + "\n").encode())


FORMAT = Format(
    name="cvat",
    target="manifest.jsonl",
    meaning="a dataset manifest of CVAT (JSON Lines)",
    write=write_cvat,
    root="the top of CVAT's share, or s3://BUCKET of its cloud storage; default: the folder of all images",
)
