"""Put true labels in the place of pseudo-labels, for baselines that score a proxy trained on true labels.

Reads   clusters/pseudo_labels of a run, its true labels
Writes  clusters/pseudo_labels of another run directory, which stages train and select read
"""

import numpy as np
import pyarrow as pa

from elfs_ray.evaluation.true_labels import TrueLabels
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, RunDir


def write_labels_as_clusters(run_dir: RunDir, source: RunDir, labels: TrueLabels) -> None:
    """Write the pseudo-label table of `source` with true labels. Raises ValueError if a sample has none."""
    sizes = np.zeros(labels.num_classes, np.int64)
    for path in source.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path)
        true_labels = labels.of(rows[schema.SAMPLE_ID].to_numpy())
        place = rows.schema.get_field_index(schema.PSEUDO_LABEL)
        rows = rows.set_column(place, schema.PSEUDO_LABELS_SCHEMA.field(place), pa.array(true_labels, pa.int32()))
        filesystem.write_table(run_dir.path(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, filesystem.basename(path)), rows)
        sizes += np.bincount(true_labels, minlength=len(sizes))
    result = ClusterResult(int(sizes.sum()), labels.num_classes, "true labels", workers=1, sizes=sizes.tolist())
    run_dir.mark_complete(Marker("cluster", {}, {"cluster": source.identity("cluster")}, result.to_json()))
