"""Label Studio: a list of tasks in JSON, to be imported into a project whose label config shows $image."""

import json
from urllib.parse import quote

from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.places import refuse_containers, relative_places
from elfs_ray.storage import filesystem, schema

LOCAL_FILES = "/data/local-files/?d="


def write_label_studio(coreset: Coreset, out: str, root: str | None) -> None:
    """Write a task for each image: `image` for Label Studio; `uri`, by which select.labelled knows it, and metadata.

    root: the folder from which Label Studio serves local files, its LOCAL_FILES_DOCUMENT_ROOT; "/" as there.
    """
    refuse_containers(coreset, "Label Studio")
    local = [place for place in coreset.places if not filesystem.is_uri(place)]
    below = dict(zip(local, relative_places(coreset.at(tuple(local)), root or "/"), strict=True))
    tasks = [
        {"data": {"image": LOCAL_FILES + quote(below[place]) if place in below else place, "uri": uri, **metadata}}
        for place, uri, metadata in zip(
            coreset.places, coreset.rows[schema.URI].to_pylist(), coreset.metadata(), strict=True
        )
    ]
    lines = ",\n".join(json.dumps(task, ensure_ascii=False) for task in tasks)
    filesystem.write_bytes(out, f"[\n{lines}\n]\n".encode())


FORMAT = Format(
    name="label-studio",
    target="label-studio.json",
    meaning="tasks of Label Studio (JSON)",
    write=write_label_studio,
    root="Label Studio's LOCAL_FILES_DOCUMENT_ROOT, / if it is not set",
)
