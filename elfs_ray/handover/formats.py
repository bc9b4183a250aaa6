"""List the formats that a coreset can be exported to."""

from elfs_ray.handover import copy, csv, cvat, fiftyone, huggingface, label_studio, webdataset
from elfs_ray.handover.format import Format

FORMATS: tuple[Format, ...] = (
    label_studio.FORMAT,
    cvat.FORMAT,
    fiftyone.FORMAT,
    huggingface.FORMAT,
    csv.FORMAT,
    copy.FORMAT,
    webdataset.FORMAT,
)
