"""FiftyOne: a folder with samples.json, which dataset type LegacyFiftyOneDataset reads and makes the fields from."""

import json
from typing import Any

from elfs_ray.config import ConfigError
from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.places import refuse_containers
from elfs_ray.storage import filesystem, schema


def write_fiftyone(coreset: Coreset, out: str, root: str | None) -> None:
    """Write a sample for each image, with its metadata as fields; the pseudo-label is a Classification."""
    refuse_containers(coreset, "FiftyOne")
    remote = [place for place in coreset.places if filesystem.is_uri(place)]
    if remote:
        raise ConfigError(
            f"FiftyOne opens local files, and {remote[0]} is none: export with --to copy --out FOLDER first, then with "
            "--copies FOLDER"
        )
    samples = [
        _sample(place, uri, metadata)
        for place, uri, metadata in zip(
            coreset.places, coreset.rows[schema.URI].to_pylist(), coreset.metadata(), strict=True
        )
    ]
    # metadata.json last: without it FiftyOne knows no name for the dataset, and half a folder is told from a whole one.
    _write_json(filesystem.join(out, "samples.json"), {"samples": samples})
    _write_json(filesystem.join(out, "metadata.json"), {"name": coreset.name, "media_type": "image"})


def _sample(place: str, uri: str, metadata: dict[str, Any]) -> dict[str, Any]:
    fields = dict(metadata)
    if schema.PSEUDO_LABEL in fields:
        fields[schema.PSEUDO_LABEL] = {"_cls": "Classification", "label": str(fields[schema.PSEUDO_LABEL])}
    return {"filepath": place, "tags": [schema.CORESET], schema.URI: uri, **fields}


def _write_json(path: str, content: dict[str, Any]) -> None:
    filesystem.write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


FORMAT = Format(
    name="fiftyone",
    target="fiftyone",
    meaning="a dataset of FiftyOne (folder of JSON files)",
    write=write_fiftyone,
)
