"""Define every table of a run directory in one place: its name, columns, types and file names."""

import posixpath
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

# Tables, in the order in which the stages write them.
INDEX = "index"
REJECTED = "rejected"
EMBEDDINGS = "embeddings"
PROXY_IMAGES = "proxy_images"
CLUSTERS = "clusters"
DYNAMICS = "dynamics"
SCORES = "scores"
CORESET = "coreset"
NEIGHBORS = "neighbors"
DUPLICATES = "duplicates"
GONE = "gone"  # of stage index, in runs whose pool has lost images

# Columns.
SAMPLE_ID = "sample_id"
URI = "uri"
LABEL = "label"
KEY = "key"
VERSION = "version"
NUM_ROWS = "num_rows"
STAGE = "stage"
REASON = "reason"
EMBEDDING = "embedding"
IMAGE = "image"
CENTROID_ID = "centroid_id"
CENTROID = "centroid"
PSEUDO_LABEL = "pseudo_label"
DISTANCE = "distance"
NEIGHBOR_IDS = "neighbor_ids"
SIMILARITY = "similarity"
REPRESENTATIVE = "representative"
TARGET_PROB = "target_prob"
MAX_OTHER_PROB = "max_other_prob"
EL2N = "el2n"
PROTOTYPICALITY = "prototypicality"
SCORE = "score"
RANK = "rank"

INDEX_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (URI, pa.string()), (LABEL, pa.int32())])
FILES_SCHEMA = pa.schema([(KEY, pa.uint64()), (VERSION, pa.uint64()), (SAMPLE_ID, pa.int64()), (NUM_ROWS, pa.int64())])
GONE_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (URI, pa.string())])
REJECTED_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (URI, pa.string()), (STAGE, pa.string()), (REASON, pa.string())])
PROXY_IMAGES_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (IMAGE, pa.binary())])
PSEUDO_LABELS_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (PSEUDO_LABEL, pa.int32()), (DISTANCE, pa.float32())])
DYNAMICS_SCHEMA = pa.schema(
    [(SAMPLE_ID, pa.int64()), (TARGET_PROB, pa.float32()), (MAX_OTHER_PROB, pa.float32()), (EL2N, pa.float32())]
)
DUPLICATES_SCHEMA = pa.schema([(SAMPLE_ID, pa.int64()), (REPRESENTATIVE, pa.int64()), (SIMILARITY, pa.float32())])
RESULTS_SCHEMA = pa.schema(
    [
        ("selection", pa.string()),
        ("run", pa.string()),
        ("budget", pa.string()),
        ("num_samples", pa.int64()),
        ("hard_fraction", pa.float64()),
        ("seed", pa.int64()),
        ("network", pa.string()),
        ("iterations", pa.int64()),
        ("last_accuracy", pa.float64()),
        ("best_accuracy", pa.float64()),
        ("accuracies", pa.list_(pa.float64())),
    ]
)
CORESET_SCHEMA = pa.schema(
    [
        (SAMPLE_ID, pa.int64()),
        (URI, pa.string()),
        (PSEUDO_LABEL, pa.int32()),
        (SCORE, pa.float32()),
        (RANK, pa.int64()),
    ]
)

# Files.
FILES_DIR = "_files"  # of index/: the pool's files, with their keys and versions
SUCCESS_FILE = "_SUCCESS.json"
STARTED_FILE = "_STARTED.json"
CENTROIDS_FILE = "centroids.parquet"
PSEUDO_LABELS_DIR = "pseudo_labels"
CORESETS_DIR = "coresets"  # further selections from a finished run, a folder each
REPORT_FILE = "report.html"
EVALUATE_DIR = "evaluate"  # what an evaluation at the end of the job writes
RESULTS_FILE = "results.parquet"
METRICS_FILE = "metrics.json"
ENCODER_FILE = "encoder.pt"
DATASET_FILE = "dataset.json"  # next to the train and test pools of a published benchmark

_TO_ESCAPE = re.compile("[\n\r]|%0A|%0D|%25")


def embeddings_schema(dim: int) -> pa.Schema:
    """Return the schema of embeddings/: sample_id int64, embedding fixed_size_list<float16>[dim] of unit length."""
    return pa.schema([(SAMPLE_ID, pa.int64()), (EMBEDDING, pa.list_(pa.float16(), dim))])


def neighbors_schema(num_neighbors: int) -> pa.Schema:
    """Return the schema of neighbors/, where k is `num_neighbors`.

    sample_id int64, neighbor_ids fixed_size_list<int64>[k] with the most similar first, similarity
    fixed_size_list<float32>[k] (cosine).
    """
    return pa.schema(
        [
            (SAMPLE_ID, pa.int64()),
            (NEIGHBOR_IDS, pa.list_(pa.int64(), num_neighbors)),
            (SIMILARITY, pa.list_(pa.float32(), num_neighbors)),
        ]
    )


def matrix_column(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Return an (n, k) array as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def matrix_of(table: pa.Table, column: str) -> np.ndarray:
    """Return a column of fixed-size lists as an (n, k) array."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size)


def centroids_schema(dim: int) -> pa.Schema:
    """Return the schema of the centroids: centroid_id int32, centroid fixed_size_list<float32>[dim]."""
    return pa.schema([(CENTROID_ID, pa.int32()), (CENTROID, pa.list_(pa.float32(), dim))])


def coreset_text_file(table: str) -> str:
    """Return the name of the text file of a coreset, next to its table, which lists its uris, one a line."""
    return f"{table}.txt"


def escape_line_breaks(uri: str) -> str:
    """Return a uri without line breaks, escaped so that no two uris give the same line.

    A uri that holds a line break, %0A, %0D or %25 is escaped: % becomes %25, and line breaks become %0A and %0D. To get
    the uri back, replace %0A, %0D and %25 in this order. Other uris are unchanged.
    """
    if not _TO_ESCAPE.search(uri):
        return uri
    return uri.replace("%", "%25").replace("\n", "%0A").replace("\r", "%0D")


def range_file(first_id: int, last_id: int) -> str:
    """Return the name of the file that holds sample ids first_id..last_id, inclusive."""
    # Twelve digits, so that names sort in the order of their ids.
    return f"part-{first_id:012d}-{last_id:012d}.parquet"


def parse_range_file(path: str) -> tuple[int, int]:
    """Return the (first, last) sample id in the name of a file, as `range_file` made it."""
    first, last = posixpath.basename(path).removeprefix("part-").removesuffix(".parquet").split("-")
    return int(first), int(last)


def epoch_dir(epoch: int) -> str:
    """Return the folder of one epoch's training dynamics, below `dynamics/`."""
    return f"epoch={epoch:03d}"


def rank_file(rank: int, world_size: int) -> str:
    """Return the name of the file in which a training worker records its samples of an epoch."""
    return f"rank-{rank:05d}-of-{world_size:05d}.parquet"


def coreset_tables(budgets: Sequence[int | float]) -> list[str]:
    """Return the table of each coreset of a selection: coreset for the first budget, coreset-<budget> for others."""
    return [CORESET, *(f"{CORESET}-{budget}" for budget in budgets[1:])]
