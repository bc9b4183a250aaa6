"""True labels in the place of pseudo-labels, for the rivals that score a proxy trained on them.

Reads   clusters/pseudo_labels (which samples, and their files), the true labels
Writes  clusters/pseudo_labels of another run directory, for stages train and select to read
"""

import pyarrow as pa

from elfs_ray.evaluation.data import TrueLabels
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir


def write_labels_as_clusters(run_dir: RunDir, source: RunDir, labels: TrueLabels) -> None:
    """Write every pseudo-labelled sample of `source` with its true label. Raises ValueError where one has none."""
    num_rows = 0
    for path in source.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path)
        own = pa.array(labels.of(rows[schema.SAMPLE_ID].to_numpy()), pa.int32())
        place = rows.schema.get_field_index(schema.PSEUDO_LABEL)
        rows = rows.set_column(place, schema.PSEUDO_LABELS_SCHEMA.field(place), own)
        filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, path.rsplit("/", 1)[1]), rows)
        num_rows += rows.num_rows
    figures = {"rows": num_rows, "num_clusters": labels.num_classes, "method": "true labels"}
    run_dir.mark_complete(Marker("cluster", {}, {"cluster": source.identity("cluster")}, figures))
