"""Select by coverage from an array of embeddings in this process: what stage select does on files with many workers.

The same embeddings, ids, seed and pseudo-labels give the same samples in the same order as a run.
"""

from dataclasses import dataclass

import numpy as np
import torch

from elfs_ray.methods.clustering_trust import LEAST_TRUST, TRUST_ROWS, estimate_trust
from elfs_ray.methods.encoders.encoder import to_unit_float16
from elfs_ray.methods.kmeans.points import smallest_ids
from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, highest_similarity, sum_of
from elfs_ray.methods.selection.pruning import budget_count, random_selection

UNIT_TOLERANCE = 0.01  # as a unit vector rounded to float16 is not exactly of length 1
_BLOCK = 10_000


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Selected samples in their order; every beginning of it is a selection of its own.

    ids: (b,) int64, rows of the embeddings unless other ids were given.
    scores: (b,) float32, by how much each raised the sum of similarities over the pool when it was selected.
    coverage, random_coverage: the mean similarity, 0 to 1, of the pool to its nearest selected or labelled sample, and
        with random samples in place of the selected ones.
    classes_first: whether the first samples were to cover their pseudo-classes alone.
    num_samples: the number of samples that were to be covered.
    """

    ids: np.ndarray
    scores: np.ndarray
    coverage: float
    random_coverage: float
    classes_first: bool
    num_samples: int

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        ids = ", ".join(map(str, self.ids[:5].tolist())) + (", …" if len(self) > 5 else "")
        place = "each pseudo-class, then the whole pool" if self.classes_first else "the whole pool"
        return (
            f"Selection of {len(self):,} of {self.num_samples:,} samples, covering {place}: mean similarity "
            f"{self.coverage:.3f} to the nearest one, {self.random_coverage:.3f} with random samples; ids [{ids}]"
        )


def select(
    embeddings: np.ndarray | torch.Tensor,
    budget: int | float,
    *,
    pseudo_labels: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """Select the samples to label, in their order, without a cluster: in turn the one that makes all others most
    similar to a selected one (greedy facility location). Similarities are those of the embeddings minus their mean.

    embeddings: (n, d), an array or a tensor, of any length but 0. They are rounded to float16 as in a run.
    budget: a number of samples, or as a float the fraction of n.
    pseudo_labels: (n,) int. If at least 60% look right by their neighbours, the first samples, with the labelled ones
        as many as there are classes, each cover members of their own class alone.
    labelled: ids of samples that are labelled already: they cover others and are not selected again.
    exclude: ids of samples that are neither selected nor covered, unless they are labelled.
    ids: (n,) int, distinct ids of the samples; 0 to n-1 by default.

    Raises ValueError for shapes, ids or a budget that do not fit. Memory: 8·n·d bytes, and 2·n² of similarities up to
    20,000 samples; above that 0.8 GB, at the end 1.6 GB.
    """
    rows = _rows_of(embeddings, ids, pseudo_labels)
    count = budget_count(budget, len(rows.sample_ids))
    labelled_ids, excluded = _known(labelled, "labelled", rows), _known(exclude, "exclude", rows)
    excluded = np.setdiff1d(excluded, labelled_ids)  # what is labelled covers others all the same, as in a run
    left = np.setdiff1d(rows.sample_ids, excluded)
    others = np.setdiff1d(left, labelled_ids)
    if count > len(others):
        raise ValueError(f"budget is {count}, but only {len(others)} samples are neither labelled nor excluded")
    num_classes = 0 if rows.groups is None or not _look_right(rows, seed) else len(np.unique(rows.groups))
    num_first = min(count, max(0, num_classes - len(labelled_ids)))
    whole = rows._replace(groups=None).centred(sum_of(rows.among(left).embeddings) / len(left))
    steps = [each for each in ((rows, num_first), (whole, count - num_first)) if each[1]]
    selected, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for each, number in steps:
        chosen, gains = _choose(each, number, np.union1d(labelled_ids, selected), left, seed)
        selected, scores = np.concatenate([selected, chosen]), np.concatenate([scores, gains])
    measured = whole.among(greedi.samples_of(left, seed)[1])

    def coverage(chosen: np.ndarray) -> float:
        near = whole.among(np.union1d(chosen, labelled_ids)).embeddings
        return float(highest_similarity(measured.embeddings, near).mean(dtype=np.float64) / SIMILARITY_ONE)

    return Selection(
        ids=selected,
        scores=scores,
        coverage=coverage(selected),
        random_coverage=coverage(others[random_selection(others, count, seed)]),
        classes_first=num_first > 0,
        num_samples=len(left),
    )


def _choose(
    rows: greedi.Rows, count: int, covering_ids: np.ndarray, left: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (b,) of the next `count` samples in their order, and the scores (b,) float32.

    covering_ids: those that cover others already; left: those that are to be covered.
    """
    covering = rows.among(covering_ids) if len(covering_ids) else None
    # Divided before any are excluded, as a run does.
    ranges = greedi.partitions(len(rows.sample_ids))
    parts = [rows.among(np.intersect1d(rows.sample_ids[part.start : part.stop], left)) for part in ranges]
    if len(parts) == 1:
        order, gains = greedi.select(parts[0], count, covering)
        return parts[0].sample_ids[order], greedi.scores_of(gains, len(left), len(left))
    num_candidates = greedi.num_candidates(len(parts))
    share = greedi.share_of(rows.sample_ids, np.setdiff1d(left, covering_ids), count)
    # A partition may have no samples but excluded ones.
    nominees = [greedi.nominate(part, num_candidates, share, covering) for part in parts if len(part.sample_ids)]
    points = rows.among(greedi.samples_of(left, seed)[0])
    merged = greedi.merge(nominees, points, count, covering)
    return merged.sample_ids, greedi.scores_of(merged.gains, len(points.sample_ids), len(left))


def _rows_of(
    embeddings: np.ndarray | torch.Tensor, ids: np.ndarray | None, pseudo_labels: np.ndarray | None
) -> greedi.Rows:
    """Return the samples, ascending by id, with unit embeddings in float16. Raises ValueError for a bad shape."""
    array = _array_of(embeddings)
    if array.ndim != 2 or not len(array) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"embeddings are {array.shape} {array.dtype}; must be (n, d) floating-point numbers")
    sample_ids = np.arange(len(array)) if ids is None else np.asarray(ids)
    columns = {"ids": sample_ids} | ({} if pseudo_labels is None else {"pseudo_labels": np.asarray(pseudo_labels)})
    for name, column in columns.items():
        if column.shape != (len(array),) or not np.issubdtype(column.dtype, np.integer):
            raise ValueError(f"{name} are {column.shape} {column.dtype}; must be ({len(array)},) integers")
    order = np.argsort(sample_ids, kind="stable")
    sample_ids = sample_ids[order].astype(np.int64)
    if (sample_ids[1:] == sample_ids[:-1]).any():
        raise ValueError("ids hold one id twice; each sample must have its own")
    unit = np.empty(array.shape, np.float16)
    for start in range(0, len(array), _BLOCK):
        block = slice(start, start + _BLOCK)
        unit[block] = _unit(array[order[block]], sample_ids[block])
    groups = None if pseudo_labels is None else columns["pseudo_labels"][order]
    return greedi.Rows(unit, sample_ids, groups)


def _array_of(embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(embeddings, torch.Tensor):
        return np.asarray(embeddings)
    tensor = embeddings.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy knows no bfloat16


def _unit(rows: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Return embeddings (m, d) as float16 of unit length. Memory: 24·m·d bytes.

    Raises ValueError for an embedding without a direction.
    """
    unit, usable = to_unit_float16(rows)
    if not usable.all():
        raise ValueError(
            f"the embedding of id {sample_ids[~usable][0]} is zero, NaN or infinite; leave such samples out"
        )
    if rows.dtype == np.float16:
        # Those of a run have been scaled and rounded; a second time could change their last bits.
        is_unit = np.abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1) < UNIT_TOLERANCE
        unit[is_unit] = rows[is_unit]
    return unit


def _known(ids: np.ndarray | None, name: str, rows: greedi.Rows) -> np.ndarray:
    """Return distinct ids (l,) int64, ascending. Raises ValueError for ids that are not those of samples."""
    known = np.unique(np.asarray([] if ids is None else ids, dtype=np.int64))
    unknown = np.setdiff1d(known, rows.sample_ids)
    if len(unknown):
        raise ValueError(f"{name} holds id {unknown[0]}, which no sample has ({len(unknown)} such ids)")
    return known


def _look_right(rows: greedi.Rows, seed: int) -> bool:
    """Return whether enough of the pseudo-labels look right by their neighbours, as for labels that a run is given."""
    hashes = hash_uint64(seed, rows.sample_ids)
    sample = rows.among(smallest_ids([(hashes, rows.sample_ids)], TRUST_ROWS))
    assert sample.groups is not None
    classes, labels = np.unique(sample.groups, return_inverse=True)
    trust = estimate_trust(torch.from_numpy(sample.embeddings), labels, len(classes), seed=seed, agreement=1.0)
    return trust is not None and trust.right >= LEAST_TRUST
