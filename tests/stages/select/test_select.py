"""select against NumPy: the scores' formulas and double-end pruning written out."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.methods.selection import pruning
from elfs_ray.stages.select import coreset_files, scored_pool, selection
from elfs_ray.stages.select import run as select
from elfs_ray.stages.select.coreset_files import write_coresets
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.stages.select.selection import Budget, choose
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests import selections
from tests.tables import contents, digit_images, digits_config, write_trained


def plain_scores(records: dict) -> dict[str, np.ndarray]:
    """Return the scores by their plain formulas, one line each."""
    target, other = records["target_prob"].astype(float), records["max_other_prob"].astype(float)
    right = target > other
    forgotten = (right[:-1] & ~right[1:]).sum(0)
    return {
        "aum": (target - other).sum(0),
        "forgetting": np.where(right.any(0), forgotten, len(target)),
        "el2n": records["el2n"].astype(float)[:10].sum(0),
        "correctness": right.sum(0),
    }


HARD_IS_LOW = {"aum": True, "forgetting": False, "el2n": False, "correctness": True}


def read(run_dir: RunDir, table: str) -> dict[str, np.ndarray]:
    rows = pq.read_table(run_dir.path(table)) if table == "scores" else None
    rows = rows or pq.ParquetDataset(run_dir.table_files(table)).read()
    return {name: rows[name].to_numpy() for name in rows.column_names}


@pytest.fixture(scope="module")
def trained(ray_cluster, tmp_path_factory) -> tuple[RunDir, dict]:
    """Return a run directory that is complete up to its scores, in several files, and the records of its training.

    Each test writes its own coreset there.
    """
    run_dir = RunDir(tmp_path_factory.mktemp("trained"))
    records = write_trained(run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "IDS_PER_FILE", 300)
        select.run_select(digits_config(Path(run_dir.uri)), run_dir)
    return run_dir, records


@pytest.fixture
def select_again(trained, monkeypatch):
    """Return a function that selects in the run directory of `trained`, into several files."""
    monkeypatch.setattr(select, "IDS_PER_FILE", 300)
    monkeypatch.setattr(selection, "RANKS_PER_FILE", 70)
    run_dir, _ = trained
    for table in ("coreset", "coreset-0.1", "coreset-0.3"):
        filesystem.delete(run_dir.path(table))
    return lambda *overrides: select.run_select(digits_config(Path(run_dir.uri), *overrides), run_dir)


@pytest.mark.parametrize("score", ["aum", "forgetting", "el2n", "correctness"])
def test_coresets_equal_sort_and_slice_for_every_score_budget_and_beta(trained, select_again, score):
    run_dir, records = trained
    budgets = {"coreset": (0.2, 0.8), "coreset-0.3": (0.3, 0.0), "coreset-0.1": (0.1, 0.25)}
    keys = ["budget=[0.2,0.3,0.1]", "select.hard_fraction=[0.8,0,0.25]"]
    result = select_again(f"select.score={score}", *keys)

    ids, plain = records["sample_id"], plain_scores(records)[score]
    hardness = plain.astype(np.float32) * (1 if HARD_IS_LOW[score] else -1)
    order = ids[np.lexsort((ids, hardness))]
    for table, (budget, hard_fraction) in budgets.items():
        start, count = int(hard_fraction * len(ids)), int(budget * len(ids))
        coreset = read(run_dir, table)
        np.testing.assert_array_equal(coreset["sample_id"], order[start : start + count])
        np.testing.assert_array_equal(coreset["rank"], np.arange(count))
        selected = result.coresets[table]
        assert (selected.num_hard, selected.num_easy) == (start, len(ids) - start - count)
        uris = filesystem.read_bytes(run_dir.path(f"{table}.txt")).decode().splitlines()
        assert uris == [f"/digits/{i}.png" for i in coreset["sample_id"]]
    assert result.rows == len(ids) // 5


def test_scores_equal_the_plain_formulas_and_cover_every_sample(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    records = write_trained(run_dir, num_epochs=12)
    select.run_select(digits_config(tmp_path), run_dir)
    scores = read(run_dir, "scores")
    np.testing.assert_array_equal(scores["sample_id"], records["sample_id"])
    for name, plain in plain_scores(records).items():
        np.testing.assert_allclose(scores[name], plain, rtol=1e-6, atol=1e-6)


def test_a_run_resumed_after_half_of_the_scores_gives_the_same_bytes(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(select, "IDS_PER_FILE", 300)
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    select.run_select(digits_config(tmp_path), run_dir)
    first = contents(tmp_path, "scores", "coreset")
    next((tmp_path / "scores").iterdir()).unlink()
    for path in (tmp_path / "coreset").iterdir():
        path.unlink()
    select.run_select(digits_config(tmp_path), run_dir)
    assert contents(tmp_path, "scores", "coreset") == first


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["rank-00001-of-00003.parquet", "rank-*"])
def test_missing_records_are_an_error_that_names_the_folder(ray_cluster, tmp_path, lost):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    for path in (tmp_path / "dynamics" / "epoch=003").glob(lost):
        path.unlink()
    with pytest.raises(RuntimeError, match=r"dynamics/epoch=003 has \d+ records of the \d+ samples.* run again"):
        select.run_select(digits_config(tmp_path), run_dir)


def test_line_breaks_in_names_are_escaped_so_that_a_uri_stays_on_its_line():
    assert schema.escape_line_breaks("/pool/50% off.png") == "/pool/50% off.png"
    assert schema.escape_line_breaks("https://host/a%20b.png") == "https://host/a%20b.png"
    assert schema.escape_line_breaks("/pool/a\nb%.png") == "/pool/a%0Ab%25.png"


def test_an_escaped_line_gives_its_uri_back():
    parts = ("a", "\n", "\r", "%", "%0A", "%0D", "%25", "0A", "25")
    uris = {"".join(chosen) for length in range(5) for chosen in itertools.product(parts, repeat=length)}
    for uri in uris:
        line = schema.escape_line_breaks(uri)
        assert not {"\n", "\r"} & set(line)
        assert line.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%") == uri


@pytest.mark.parametrize("in_bucket", [False, True])
def test_the_text_of_a_coreset_has_the_uris_of_all_its_files_in_order(request, tmp_path, monkeypatch, in_bucket):
    monkeypatch.setattr(coreset_files, "TEXT_ROWS", 7)
    run_dir = RunDir(request.getfixturevalue("s3_bucket") if in_bucket else tmp_path)
    uris = [f"/pool/{number}.png" for number in range(50)]
    for first in (0, 20):
        path = run_dir.path("coreset", schema.range_file(first, first + 19))
        filesystem.write_table(path, pa.table({"uri": uris[first : first + 20]}))
    coreset_files._write_text(run_dir, "coreset")
    assert filesystem.read_bytes(run_dir.path("coreset.txt")).decode() == "".join(f"{uri}\n" for uri in uris[:40])


LABELS = digit_images(1003)[1]


def kept_by_class(ids: np.ndarray, scores: np.ndarray, hard_fraction: float, shares: dict[int, int]) -> set[int]:
    """Return the ids that double-end pruning of each class alone keeps, by sorting."""
    kept: set[int] = set()
    for label, share in shares.items():
        members = np.flatnonzero(LABELS[ids] == label)
        order = members[np.lexsort((ids[members], scores[members]))]
        start = min(int(hard_fraction * len(members)), len(members) - share)
        kept |= set(ids[order[start : start + share]].tolist())
    return kept


@pytest.mark.parametrize("hard_fraction", [0.0, 0.45])
def test_balance_keeps_an_equal_window_of_every_pseudo_class(trained, select_again, hard_fraction):
    run_dir, records = trained
    ids, aum = records["sample_id"], plain_scores(records)["aum"].astype(np.float32)
    select_again("select.balance=true", f"select.hard_fraction={hard_fraction}")
    coreset = read(run_dir, "coreset")
    assert set(coreset["sample_id"].tolist()) == kept_by_class(ids, aum, hard_fraction, dict.fromkeys(range(10), 20))
    place = {sample_id: at for at, sample_id in enumerate(ids.tolist())}
    at = [place[sample_id] for sample_id in coreset["sample_id"].tolist()]
    np.testing.assert_array_equal(np.lexsort((ids[at], aum[at])), np.arange(200))
    np.testing.assert_array_equal(coreset["pseudo_label"], LABELS[coreset["sample_id"]])


def in_memory(method: str, balance: bool, ids: np.ndarray, scores: dict, count: int) -> np.ndarray:
    """Return the sample ids that the in-memory method keeps, by class if it is balanced."""
    if balance:
        groups = [np.flatnonzero(LABELS[ids] == label) for label in range(10)]
        shares = pruning.allocate_evenly(np.array([len(group) for group in groups]), count)
    else:
        groups, shares = [np.arange(len(ids))], [count]
    kept = []
    for group, share in zip(groups, shares, strict=True):
        aum, dual, prob = (scores[name][group] for name in ("aum", "dual", "dual_mean_prob"))
        group_ids = ids[group]
        positions = {
            "hardest": selections.hardest(aum, group_ids, int(share), "low"),
            "easiest": selections.easiest(aum, group_ids, int(share), "low"),
            "random": pruning.random_selection(group_ids, int(share), seed=4),
            "stratified": selections.stratified(aum, group_ids, int(share), 0.1, "low", seed=4, num_strata=7),
            "dual_beta": selections.dual_beta(dual, prob, group_ids, int(share), seed=4),
        }
        kept.append(group_ids[positions[method]])
    return np.sort(np.concatenate(kept))


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("method", ["hardest", "easiest", "random", "stratified", "dual_beta"])
def test_every_method_over_files_keeps_what_it_keeps_in_memory(trained, select_again, method, balance):
    run_dir, records = trained
    ids = records["sample_id"]
    result = select_again(f"select.method={method}", f"select.balance={balance}", "seed=4", "select.num_strata=7")
    coreset = read(run_dir, "coreset")
    # A random selection reads no scores, and writes none.
    unread = dict.fromkeys(("aum", "dual", "dual_mean_prob"), np.ones(len(ids), np.float32))
    scores = unread if method == "random" else read(run_dir, "scores")
    np.testing.assert_array_equal(np.sort(coreset["sample_id"]), in_memory(method, balance, ids, scores, 200))
    assert result.rows == 200
    np.testing.assert_array_equal(coreset["rank"], np.arange(200))


@pytest.mark.parametrize("method", ["double_end", "stratified", "dual_beta"])
def test_several_budgets_at_once_are_the_coresets_of_each_alone(ray_cluster, tmp_path, method):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    budgets = (("coreset", "0.1", 0.4), ("coreset-0.3", "0.3", 0.2), ("coreset-50", "50", 0.1))
    alone = {}
    for table, budget, beta in budgets:
        overrides = [f"select.method={method}", f"budget={budget}", f"select.hard_fraction={beta}"]
        filesystem.delete(run_dir.path("coreset"))
        select.run_select(digits_config(tmp_path, *overrides), run_dir)
        alone[table] = contents(tmp_path, "coreset")
    filesystem.delete(run_dir.path("coreset"))
    keys = [f"select.method={method}", "budget=[0.1,0.3,50]", "select.hard_fraction=[0.4,0.2,0.1]"]
    select.run_select(digits_config(tmp_path, *keys), run_dir)
    for table, separate in alone.items():
        together = contents(tmp_path, table)
        assert {filesystem.basename(path): data for path, data in together.items()} == {
            filesystem.basename(path): data for path, data in separate.items()
        }


def test_prototypicality_keeps_what_is_farthest_from_its_centroid(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    for path in run_dir.table_files("clusters", "pseudo_labels"):
        rows = filesystem.read_table(path)
        far = pa.array((rows["sample_id"].to_numpy() * 7919 % 1003).astype(np.float32))
        filesystem.write_table(path, rows.set_column(2, "distance", far))
    select.run_select(digits_config(tmp_path, "select.method=prototypicality"), run_dir)
    coreset = read(run_dir, "coreset")
    np.testing.assert_array_equal(coreset["score"], np.sort(coreset["score"])[::-1])
    np.testing.assert_array_equal(coreset["score"], coreset["sample_id"] * 7919 % 1003)
    assert coreset["score"].min() >= 1003 - 200 - 3


@pytest.mark.parametrize("overrides", [[], ["select.balance=true"], ["select.method=stratified", "budget=[0.2,0.05]"]])
def test_the_number_of_files_in_a_task_changes_nothing(ray_cluster, tmp_path, monkeypatch, overrides):
    monkeypatch.setattr(select, "IDS_PER_FILE", 150)
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    coresets = []
    for max_shares in (1, 4, 7):
        monkeypatch.setattr(scored_pool, "MAX_SHARES", max_shares)
        select.run_select(digits_config(tmp_path, *overrides), run_dir)
        coresets.append(contents(tmp_path, "coreset", "coreset-0.05"))
    assert coresets[0] == coresets[1] == coresets[2]


def write_scored(folder, scores: np.ndarray, num_files: int) -> ScoredPool:
    """Write scores/ and index/ of samples 0..n-1, as many in each file. Returns the pool."""
    run_dir, ids = RunDir(folder), np.arange(len(scores))
    for file_ids in np.array_split(ids, num_files):
        name = schema.range_file(int(file_ids[0]), int(file_ids[-1]))
        labels = np.zeros(len(file_ids), np.int32)
        columns = {"sample_id": file_ids, "pseudo_label": labels, "aum": scores[file_ids]}
        filesystem.write_table(run_dir.path("scores", name), pa.table(columns))
        uris = [f"/{i}.png" for i in file_ids.tolist()]
        index = pa.table([file_ids, uris, pa.nulls(len(file_ids), pa.int32())], schema=schema.INDEX_SCHEMA)
        filesystem.write_table(run_dir.path("index", name), index)
    return ScoredPool(tuple(run_dir.table_files("scores")), "aum", "low", len(scores), 1)


@pytest.mark.parametrize(
    ("num_samples", "num_files", "num_workers"),
    [
        *((1, 1, 1), (10, 7, 4), (999, 3, 2), (100_000, 7, 3)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1000, 1, 1), (1000, 5, 4), (100_000, 2, 2)]),
    ],
)
def test_double_end_is_sort_and_slice_for_every_rate_and_beta(
    ray_cluster, tmp_path, monkeypatch, num_samples, num_files, num_workers
):
    """All windows of a grid at once, over any number of files, dealt to any number of workers; many scores tie."""
    monkeypatch.setattr(scored_pool, "MAX_SHARES", num_workers)
    monkeypatch.setattr(selection, "RANKS_PER_FILE", 30_000)
    rng = np.random.default_rng(num_samples)
    scores = (rng.integers(-40, 200, num_samples) / 8).astype(np.float32)
    pool = write_scored(tmp_path, scores, num_files)
    budgets = [
        Budget(pruning.budget_count(1 - pruned / 10, num_samples), hard / 10)
        for pruned in range(10)
        for hard in range(pruned + 1)
        if (10 - pruned) * num_samples >= 10
    ]
    selections = choose(pool, digits_config(tmp_path).select, 0, budgets)
    tables = {f"coreset-{place}": selection for place, selection in enumerate(selections)}
    write_coresets(RunDir(tmp_path), pool, tables)
    order = np.lexsort((np.arange(num_samples), scores))
    for table, budget in zip(tables, budgets, strict=True):
        start = int(Fraction(str(budget.hard_fraction)) * num_samples)
        kept = read(RunDir(tmp_path), table)["sample_id"]
        np.testing.assert_array_equal(kept, order[start : start + budget.num_kept])
