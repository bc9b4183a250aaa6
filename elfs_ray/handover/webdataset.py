"""WebDataset: tars with the images' original bytes and a JSON file of metadata for each."""

import io
import json
import tarfile
from itertools import islice
from typing import Any

from elfs_ray.handover.coreset import Coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.originals import Original, read_originals
from elfs_ray.storage import filesystem, schema

IMAGES_PER_SHARD = 1_000


def write_webdataset(coreset: Coreset, out: str, root: str | None) -> None:
    """Write coreset-<number>.tar, 1,000 images each, whose keys are the ranks.

    A tar in a bucket is first written to the machine's temporary folder.
    """
    rows = iter(zip(read_originals(coreset), coreset.metadata(), strict=True))
    num_shards = -(-coreset.rows.num_rows // IMAGES_PER_SHARD)
    for number in range(num_shards):
        path = filesystem.join(out, f"{schema.CORESET}-{number:06d}.tar")
        with filesystem.open_atomic_on_disk(path) as sink, tarfile.open(fileobj=sink, mode="w") as archive:
            for original, metadata in islice(rows, IMAGES_PER_SHARD):
                _add(archive, original, metadata)


def _add(archive: tarfile.TarFile, original: Original, metadata: dict[str, Any]) -> None:
    key = f"{original.row[schema.RANK]:09d}"
    described = json.dumps({schema.URI: original.row[schema.URI], **metadata}, ensure_ascii=False).encode()
    for name, data in ((f"{key}{original.extension}", original.data), (f"{key}.json", described)):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


FORMAT = Format(
    name="webdataset",
    target="webdataset",
    meaning="WebDataset tars with the images",
    write=write_webdataset,
    takes_places=False,
)
