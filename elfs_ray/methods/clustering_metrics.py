"""Metrics of a clustering, with and without true labels.

All but `neighbor_purity` are functions of a contingency table, which each worker counts over its shard: tables add up.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def contingency_table(rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """Count how often each pair of ids occurs: (num_rows, num_columns) int64 from two (n,) integer arrays.

    Raises ValueError where the arrays differ in length or hold an id outside its range.
    Memory: 8·(n + num_rows·num_columns) bytes.
    """
    if rows.shape != columns.shape:
        raise ValueError(f"the label arrays have shapes {rows.shape} and {columns.shape}; they must be of one length")
    for name, ids, count in (("first", rows, num_rows), ("second", columns, num_columns)):
        if ids.size and not (ids.min() >= 0 and ids.max() < count):
            raise ValueError(
                f"the {name} label array holds ids from {ids.min()} to {ids.max()}; they must be 0 to {count - 1}. "
                "Leave out samples without a label"
            )
    # One integer per pair turns the two-dimensional count into a bincount. Narrow label dtypes would overflow: int64.
    pairs = rows.astype(np.int64) * num_columns + columns
    return np.bincount(pairs, minlength=num_rows * num_columns).reshape(num_rows, num_columns)


def matched_accuracy(table: np.ndarray) -> float:
    """Return the share of samples that agree under the best one-to-one match of rows to columns (Hungarian matching).

    With clusters as rows and true labels as columns this is clustering accuracy; with the clusters of two heads it is
    the share of samples on which the heads agree. Surplus rows or columns stay unmatched.
    """
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / _total(table))


def purity(table: np.ndarray) -> float:
    """Return the accuracy of naming every cluster (row) after its most frequent label (column).

    Unlike `matched_accuracy` it allows several clusters per class, so it rises with the number of clusters.
    """
    return float(table.max(axis=1).sum() / _total(table))


def normalized_mutual_information(table: np.ndarray) -> float:
    """Return the mutual information over the arithmetic mean of the two entropies, in [0, 1].

    It is 1 where both sides have a single group.
    """
    joint = table / _total(table)
    row_entropy, column_entropy = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    if row_entropy + column_entropy == 0:
        return 1.0
    information = row_entropy + column_entropy - _entropy(joint.ravel())
    # Rounding can leave the ratio a few ulps outside the range.
    return float(np.clip(2 * information / (row_entropy + column_entropy), 0.0, 1.0))


def adjusted_rand_index(table: np.ndarray) -> float:
    """Return the Rand index corrected for chance (Hubert and Arabie 1985): 1 if equal, about 0 if independent."""
    together = _num_pairs(table).sum()
    row_pairs, column_pairs = _num_pairs(table.sum(axis=1)).sum(), _num_pairs(table.sum(axis=0)).sum()
    all_pairs = _num_pairs(np.asarray(_total(table)))
    expected = row_pairs * column_pairs / all_pairs if all_pairs else 0.0
    highest = (row_pairs + column_pairs) / 2
    return float((together - expected) / (highest - expected)) if highest != expected else 1.0


def head_agreement(head_labels: np.ndarray, head: int, num_clusters: int) -> np.ndarray:
    """Return the share of samples on which each head agrees with head `head` after matching, (H,) float64.

    `head_labels` is (H, n) integer cluster ids. The head itself scores 1; low values mean different clusterings.
    """
    tables = (contingency_table(labels, head_labels[head], num_clusters, num_clusters) for labels in head_labels)
    return np.array([matched_accuracy(table) for table in tables])


def neighbor_purity(labels: np.ndarray, rows: np.ndarray, neighbors: np.ndarray) -> float:
    """Return the mean share of a sample's neighbours that have its label.

    `labels` is (n,). `rows` (m,) are positions in it, and `neighbors` (m, k) those of their neighbours, self excluded.
    Memory: 5·k bytes per row.
    """
    return float((labels[neighbors] == labels[rows, None]).mean())


def _total(table: np.ndarray) -> int:
    total = int(table.sum())
    if total == 0:
        raise ValueError("the contingency table counts no samples; metrics need at least one labelled sample")
    return total


def _entropy(probabilities: np.ndarray) -> float:
    positive = probabilities[probabilities > 0]  # 0 · log 0 counts as 0
    return float(-(positive * np.log(positive)).sum())


def _num_pairs(counts: np.ndarray) -> np.ndarray:
    # The index multiplies two numbers of pairs, which overflows int64 from some 80,000 samples on.
    counts = counts.astype(np.float64)
    return counts * (counts - 1) / 2
