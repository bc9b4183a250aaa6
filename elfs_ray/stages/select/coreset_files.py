"""Write coresets: one pass over the scored pool collects the samples of all coresets, and a task writes each file.

Kept samples go through the object store, about 40 bytes and a uri each, never through the driver. One task writes the
text file of a coreset, 65,536 uris at a time. For a bucket it first writes to the machine's temporary folder.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from elfs_ray.methods.selection.quantiles import Cut, assign_parts, hard_first_order, part_ranks
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import get_result, run_tasks, start_task
from elfs_ray.stages.select.scored_pool import ScoredPool, ScoredRows
from elfs_ray.stages.select.selection import Selection, find_part_cuts, num_parts
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

NUM_EXAMPLES = 100
KEY = "key"
TEXT_ROWS = 65_536


class _Ends(NamedTuple):
    """The hardest and the easiest of some samples as (key, sample_id, score), the most extreme first."""

    hardest: list[tuple[int, int, float]]
    easiest: list[tuple[int, int, float]]

    def join(self, other: "_Ends") -> "_Ends":
        hardest = sorted(self.hardest + other.hardest)[:NUM_EXAMPLES]
        return _Ends(hardest, sorted(self.easiest + other.easiest, reverse=True)[:NUM_EXAMPLES])


def write_coresets(run_dir: RunDir, pool: ScoredPool, selections: Mapping[str, Selection]) -> dict[str, dict[str, Any]]:
    """Write each selection as the coreset table of its name, with a text file. Returns the metrics of each."""
    parts = {table: selection.part_cuts or _part_cuts(pool, selection) for table, selection in selections.items()}
    wanted = [(selection, parts[table]) for table, selection in selections.items()]
    places = [(table, part) for table, cuts in parts.items() for part in range(len(cuts) - 1)]
    # One return for each file to write, so that the task which writes it fetches nothing else.
    num_returns = len(places) + 1
    shares = pool.shares()
    collected = [start_task(_collect, run_dir, pool, files, wanted, num_returns=num_returns) for files in shares]

    tasks = []
    for position, (table, part) in enumerate(places):
        ranks = part_ranks(0, selections[table].count, num_parts(selections[table].count))
        pieces = [pieces[position + 1] for pieces in collected]
        tasks.append((run_dir, table, ranks[part], ranks[part + 1], ranks[-1], *pieces))
    shown: dict[str, list[list[tuple[int, float]]]] = {table: [[] for _ in cuts[1:]] for table, cuts in parts.items()}
    with Progress("select", sum(selection.count for selection in selections.values()), "images kept") as progress:
        for position, examples in run_tasks(_write_part, tasks):
            table, part = places[position]
            shown[table][part] = examples
            progress.advance(tasks[position][3] - tasks[position][2])
    ends = _join_ends([get_result(pieces[0]) for pieces in collected])
    for _ in run_tasks(_write_text, [(run_dir, table) for table in selections]):
        pass
    return {
        table: _metrics(pool, selection, [row for rows in shown[table] for row in rows], table_ends)
        for (table, selection), table_ends in zip(selections.items(), ends, strict=True)
    }


def _part_cuts(pool: ScoredPool, selection: Selection) -> tuple[Cut, ...]:
    if num_parts(selection.count) == 1:
        return (Cut(0, 0), Cut(2**32 - 1, 2**48))  # before the first and after the last (key, sample_id)
    return find_part_cuts(pool, selection)


def _metrics(
    pool: ScoredPool, selection: Selection, kept: list[tuple[int, float]], ends: tuple[_Ends, _Ends]
) -> dict[str, Any]:
    """Return counts, the range of scores, and examples of samples pruned as too hard, kept, and pruned as too easy."""
    of_all, of_pruned = ends
    num_left = pool.num_samples - selection.count - selection.num_hard
    num_easy = 0 if selection.is_sampled or pool.rank is not None else num_left
    low, high = sorted((of_all.hardest[0][2], of_all.easiest[0][2]))
    return {
        "rows": selection.count,
        "num_hard": selection.num_hard,
        "num_easy": num_easy,
        "num_not_drawn": num_left - num_easy,
        "hardest_kept": kept[0][1],
        "easiest_kept": kept[-1][1],
        "score_min": low,
        "score_max": high,
        "kept_examples": [sample_id for sample_id, _ in kept],
        "hardest_examples": [sample_id for _, sample_id, _ in of_pruned.hardest[: selection.num_hard]],
        "easiest_examples": [sample_id for _, sample_id, _ in of_pruned.easiest[:num_easy]],
    }


def _join_ends(shares: Iterable[list[tuple[_Ends, _Ends]]]) -> list[tuple[_Ends, _Ends]]:
    joined: list[tuple[_Ends, _Ends]] = []
    for share in shares:
        joined = [(a.join(c), b.join(d)) for (a, b), (c, d) in zip(joined, share, strict=True)] if joined else share
    return joined


def _collect(
    run_dir: RunDir, pool: ScoredPool, files: Sequence[str], wanted: Sequence[tuple[Selection, tuple[Cut, ...]]]
) -> tuple[Any, ...]:
    """Return, for some files, the ends of (all, pruned) samples of each coreset, then the rows of each part."""
    pieces: list[list[list[pa.Table]]] = [[[] for _ in cuts[1:]] for _, cuts in wanted]
    ends: list[tuple[_Ends, _Ends]] = [(_Ends([], []), _Ends([], [])) for _ in wanted]
    for path in files:
        rows = pool.read(path)
        keys = pool.hardness_keys(rows)
        everything = _ends(rows, keys, np.arange(keys.size))
        masks = [selection.mask(pool, rows) for selection, _ in wanted]
        any_kept = np.logical_or.reduce(masks)  # coresets overlap: the uri of a sample is read once for all of them
        table = _coreset_rows(run_dir, rows, keys, np.flatnonzero(any_kept))
        for number, ((_, cuts), mask) in enumerate(zip(wanted, masks, strict=True)):
            pruned = _ends(rows, keys, np.flatnonzero(~mask))
            ends[number] = (ends[number][0].join(everything), ends[number][1].join(pruned))
            kept = table.filter(mask[any_kept])
            parts = assign_parts(kept[KEY].to_numpy(), kept[schema.SAMPLE_ID].to_numpy(), cuts)
            for part, collected in enumerate(pieces[number]):
                collected.append(kept.filter(parts == part))
    return (ends, *(pa.concat_tables(collected) for coreset in pieces for collected in coreset))


def _coreset_rows(run_dir: RunDir, rows: ScoredRows, keys: np.ndarray, kept: np.ndarray) -> pa.Table:
    """Return the rows at the positions `kept`, with the columns of a coreset but keys instead of ranks."""
    sample_ids = rows.sample_ids[kept]
    columns = {
        schema.SAMPLE_ID: sample_ids,
        schema.URI: _uris(run_dir, sample_ids),
        schema.PSEUDO_LABEL: pa.array(rows.column(schema.PSEUDO_LABEL)[kept], pa.int32(), from_pandas=True),
        schema.SCORE: rows.scores[kept].astype(np.float32),
        KEY: keys[kept],
    }
    return pa.table(columns)


def _uris(run_dir: RunDir, sample_ids: np.ndarray) -> pa.ChunkedArray:
    """Return the uris of samples; `sample_ids` must ascend."""
    if not sample_ids.size:
        return pa.chunked_array([], pa.string())
    index = pa.concat_tables(run_dir.read_range(schema.INDEX, first=int(sample_ids[0]), last=int(sample_ids[-1])))
    return index[schema.URI].take(np.searchsorted(index[schema.SAMPLE_ID].to_numpy(), sample_ids))


def _ends(rows: ScoredRows, keys: np.ndarray, positions: np.ndarray) -> _Ends:
    """Return the hardest and easiest of the rows at some positions."""
    near = keys[positions]
    # A partition finds the candidates in linear time, so that only these are sorted.
    if positions.size > 2 * NUM_EXAMPLES:
        low, high = np.partition(near, [NUM_EXAMPLES - 1, near.size - NUM_EXAMPLES])[[NUM_EXAMPLES - 1, -NUM_EXAMPLES]]
        positions = positions[(near <= low) | (near >= high)]
    order = positions[hard_first_order(keys[positions], rows.sample_ids[positions])]

    def described(chosen: np.ndarray) -> list[tuple[int, int, float]]:
        return [(int(keys[i]), int(rows.sample_ids[i]), float(rows.scores[i])) for i in chosen]

    return _Ends(described(order[:NUM_EXAMPLES]), described(order[::-1][:NUM_EXAMPLES]))


def _write_part(
    run_dir: RunDir, table: str, first_rank: int, end_rank: int, count: int, *pieces: pa.Table
) -> list[tuple[int, float]]:
    """Sort and write one file of a coreset. Returns (sample_id, score) of its examples, spread over the coreset."""
    rows = pa.concat_tables(pieces)
    assert rows.num_rows == end_rank - first_rank, (table, rows.num_rows, first_rank, end_rank)
    rows = rows.take(hard_first_order(rows[KEY].to_numpy(), rows[schema.SAMPLE_ID].to_numpy()))
    ranked = rows.drop_columns([KEY]).append_column(schema.RANK, pa.array(np.arange(first_rank, end_rank)))
    ranked = ranked.select(schema.CORESET_SCHEMA.names).cast(schema.CORESET_SCHEMA).combine_chunks()
    filesystem.write_table(run_dir.path(table, schema.range_file(first_rank, end_rank - 1)), ranked)
    spread = np.unique(np.linspace(0, count - 1, NUM_EXAMPLES).round().astype(np.int64))
    shown = rows.take(spread[(spread >= first_rank) & (spread < end_rank)] - first_rank)
    return list(zip(shown[schema.SAMPLE_ID].to_pylist(), shown[schema.SCORE].to_pylist(), strict=True))


def _write_text(run_dir: RunDir, table: str) -> None:
    """Write the text file of a coreset: one uri a line, hardest first."""
    with filesystem.open_atomic_on_disk(run_dir.path(schema.coreset_text_file(table))) as sink:
        for path in run_dir.table_files(table):
            with filesystem.open_parquet(path) as file:
                for rows in file.iter_batches(TEXT_ROWS, columns=[schema.URI]):
                    lines = [schema.escape_line_breaks(uri) for uri in rows.column(0).to_pylist()]
                    sink.write(("\n".join(lines) + "\n").encode())
