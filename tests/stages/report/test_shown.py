"""Which images the report shows, and the thumbnails that they get. Without Ray."""

import dataclasses
import json
import os
import re

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.pool.images import open_proxy_image
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.index.records import write_gone
from elfs_ray.stages.neighbors import NeighborsResult
from elfs_ray.stages.report import lists, run, shown, thumbnails
from elfs_ray.stages.report.thumbnails import make_thumbnails
from elfs_ray.stages.select import SelectResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.image_files import encode
from tests.tables import GAPS, digits_config, mark, write_later, write_selected

LIMITS = {"side": 64, "max_bytes": 10**6, "max_seconds": 60.0}


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path)
    write_selected(run_dir)
    return run_dir


def collect(run_dir: RunDir, *overrides: str) -> shown.ShownImages:
    return shown.collect_images(digits_config(run_dir.uri, *overrides), run_dir)


def kinds_of_list(run_dir: RunDir, *overrides: str) -> dict[str, np.ndarray]:
    return collect(run_dir, *overrides).lists[0].kinds


def test_a_small_run_shows_its_whole_coreset_and_pool(run_dir):
    images = collect(run_dir)
    (shown_list,) = images.lists
    assert shown_list.ranks.tolist() == list(range(100)) and shown_list.ids.tolist() == images.ids[:100].tolist()
    assert sorted(images.ids) == [i for i in range(1003) if i not in GAPS]
    assert images.uris == [f"/digits/{i}.png" for i in images.ids]
    assert images.points.min() == 0 and images.points.max() == 1
    labels = np.concatenate([t[schema.PSEUDO_LABEL] for t in run_dir.read_table("clusters", "pseudo_labels")])
    ids = np.concatenate([t[schema.SAMPLE_ID] for t in run_dir.read_table("clusters", "pseudo_labels")])
    assert dict(zip(images.ids.tolist(), images.groups.tolist(), strict=True)) == dict(
        zip(ids.tolist(), labels.tolist(), strict=True)
    )


def test_images_that_have_left_the_pool_are_not_shown(run_dir):
    write_gone(run_dir, np.array([1, 5, 8]))  # 1 is one of the hardest
    assert sorted(collect(run_dir).ids) == [i for i in range(1003) if i not in (*GAPS, 1, 5, 8)]


def test_a_long_list_is_shown_evenly_and_long_names_leave_room_for_fewer(run_dir, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LISTED", 34)
    monkeypatch.setattr(shown, "POOL_SAMPLE", 50)
    images = collect(run_dir)
    assert images.lists[0].ranks.tolist() == list(range(0, 100, 3))
    assert 25 < len(images.kinds[shown.SAMPLED]) < 80
    monkeypatch.setattr(lists, "URI_BYTES", 60)  # a third or a quarter of what they take
    monkeypatch.setattr(shown, "OTHER_URI_BYTES", 200)
    fewer = collect(run_dir)
    assert fewer.lists[0].ranks.tolist() == list(range(0, 100, 12))
    assert len(fewer.ids) - 9 < (len(images.ids) - 34) / 2
    kinds = (*fewer.kinds.values(), *fewer.lists[0].kinds.values())
    assert all(np.isin(members, fewer.ids).all() for members in kinds)


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0], [1.0, 1.0, 0.9995]])
def test_a_pool_of_equal_images_has_a_map(run_dir, values):
    for path in run_dir.table_files(schema.EMBEDDINGS):
        table = filesystem.read_table(path)
        rows = np.zeros((len(table), 64), np.float16)
        rows[:, 0] = np.resize(values, len(table))
        filesystem.write_table(path, table.set_column(1, schema.EMBEDDING, schema.matrix_column(rows)))
    points = collect(run_dir).points
    assert ((points >= 0) & (points <= 1)).all() and (len(np.unique(points, axis=0)) > 1) == (len(set(values)) > 1)


def test_each_group_shows_the_images_nearest_to_its_centre(run_dir):
    for path in run_dir.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        table = filesystem.read_table(path)
        distance = pa.array(-table[schema.SAMPLE_ID].to_numpy().astype(np.float32))
        filesystem.write_table(path, table.set_column(2, schema.DISTANCE, distance))
    images = collect(run_dir)
    group_of = dict(zip(images.ids.tolist(), images.groups.tolist(), strict=True))
    for group in range(10):
        last = [i for i in sorted(group_of, reverse=True) if group_of[i] == group][: shown.MAX_NEAR_A_CENTRE]
        assert {i for i in images.kinds[shown.NEAR].tolist() if group_of[i] == group} == set(last)


@pytest.mark.parametrize("side", ["low", "high"])
def test_images_of_the_pool_beyond_the_cuts_are_shown_as_left_out(run_dir, side):
    selected = SelectResult.read(run_dir)
    cuts = {"low": (0.1, 0.8), "high": (0.8, 0.1)}[side]  # of scores that grow with the ids
    changed = {"hard_side": side, "hardest_kept": cuts[0], "easiest_kept": cuts[1]}
    first = dataclasses.replace(selected.coresets[schema.CORESET], hardest_examples=[], easiest_examples=[4], **changed)
    mark(run_dir, dataclasses.replace(selected, coresets={schema.CORESET: first}))
    low, high = (lists.HARD, lists.EASY) if side == "low" else (lists.EASY, lists.HARD)
    kinds = kinds_of_list(run_dir)
    assert set(kinds[low].tolist()) | {4} == {i for i in range(101) if i not in GAPS}
    assert kinds[high].tolist() == ([4] if side == "low" else []) + list(range(803, 1003))
    assert kinds[lists.EASY][0] == 4  # the examples first
    assert not len(kinds_of_list(run_dir, "select.method=hardest")[lists.HARD])


def test_labelled_images_are_shown_while_their_list_exists(run_dir, tmp_path):
    labelled = tmp_path / "labelled.txt"
    labelled.write_text("/digits/5.png\n/digits/77.png\n")  # 77 was rejected
    left_out = run_dir.path("select", "left_out", schema.range_file(0, 1002))
    filesystem.write_table(left_out, pa.table({schema.SAMPLE_ID: [5, 6]}))
    overrides = ("select.method=coverage", f"select.labelled={labelled}")
    assert kinds_of_list(run_dir, *overrides)[lists.LABELLED].tolist() == [5]
    for change in (lambda: labelled.write_text("/of/another/pool.png\n"), labelled.unlink):
        change()
        assert not len(kinds_of_list(run_dir, *overrides)[lists.LABELLED])


def test_later_selections_are_shown_by_name_beside_the_run(run_dir, monkeypatch):
    for name in ("round2", "round10", "all"):
        write_later(run_dir, name, np.array([8, 5, 900, 0]))
    images = collect(run_dir)
    names = ["coreset", "coresets/all", "coresets/round2", "coresets/round10"]
    assert [one.name for one in images.lists] == names
    later = images.lists[2]
    assert later.ids.tolist() == [8, 5, 900, 0] and later.ranks.tolist() == [0, 1, 2, 3] and later.total == 4
    assert later.uris == [f"/digits/{i}.png" for i in later.ids] and later.kinds[lists.EASY].tolist() == [7]
    assert later.group_sizes.sum() == 4 and len(set(images.ids.tolist())) == len(images.ids) == 1000
    monkeypatch.setattr(lists, "MAX_LATER_LISTS", 1)
    last = lists.read_lists(digits_config(run_dir.uri), run_dir, np.arange(4, 8))
    assert [one.name for one in last] == ["coreset", "coresets/round10"]


def test_a_later_selection_shows_the_images_that_are_still_there(run_dir):
    write_later(run_dir, "round2", np.array([8, 5, 900, 0]))
    write_later(run_dir, "round3", np.array([11, 12]))
    write_later(run_dir, "round4", np.array([8]))
    filesystem.delete(run_dir.path("coresets", "round4", "coreset"))
    write_gone(run_dir, np.array([5]))
    path = run_dir.table_files(schema.INDEX)[0]
    uris = [uri.replace("/digits/1", "/other/1") for uri in filesystem.read_table(path)[schema.URI].to_pylist()]
    index = pa.table([np.arange(1003), uris, pa.nulls(1003, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(path, index)  # as if the images had been numbered anew
    later = collect(run_dir).lists[1:]
    assert [(one.name, one.ids.tolist(), one.ranks.tolist(), one.total) for one in later] == [
        ("coresets/round2", [8, 900, 0], [0, 2, 3], 4)
    ]


def test_near_duplicates_are_shown_beside_what_stands_for_them(run_dir):
    table = pa.table([[4, 6, 8], [2, 2, 10], [0.97, 0.98, 0.99]], schema=schema.DUPLICATES_SCHEMA)
    filesystem.write_table(run_dir.path(schema.DUPLICATES, schema.range_file(0, 1002)), table)
    mark(run_dir, NeighborsResult(1000, 50, "exact"))
    mark(run_dir, DuplicatesResult(3, 2, 1000, examples=[(4, 2, 0.97), (6, 2, 0.98), (8, 10, 0.99)]))
    config = digits_config(run_dir.uri, "duplicates.threshold=0.95", "report.images_per_grid=4")
    kinds = shown.collect_images(config, run_dir).kinds
    assert kinds[shown.DUPLICATE].tolist() == [4, 6, 8] and kinds[shown.REPRESENTATIVE].tolist() == [2]
    run.run_report(config, run_dir)
    page = filesystem.read_bytes(run_dir.path("report.html")).decode()
    section = page[page.index("<h2>Near-duplicates</h2>") : page.index("<h2>What happened")]
    assert re.findall(r'data-id="(\d+)"', section) == ["2", "4", "2", "6"]
    assert "3 images are almost copies of 2 others" in section and "0.970" in section


def test_thumbnails_of_copies_end_where_the_bytes_are_used_up(run_dir):
    config, ids = digits_config(run_dir.uri), [900, 4, 5, 6, 7, 8]
    uris = {i: f"/digits/{i}.png" for i in ids}
    every = make_thumbnails(config, run_dir, uris, **LIMITS)
    copies = run_dir.read_rows(schema.PROXY_IMAGES, np.array(ids), [schema.IMAGE])[schema.IMAGE].to_pylist()
    for sample_id, copy in zip(ids, copies, strict=True):
        assert open_proxy_image(every[sample_id]).tobytes() == open_proxy_image(copy).tobytes()
    room = len(every[900]) + len(every[4])
    assert list(make_thumbnails(config, run_dir, uris, **(LIMITS | {"max_bytes": room}))) == [900, 4]


def test_thumbnails_of_originals_keep_their_shape(run_dir, tmp_path, photographs):
    (tmp_path / "a.jpg").write_bytes(encode(photographs[0].resize((960, 640)), "JPEG"))
    (tmp_path / "b.png").write_bytes(encode(photographs[1].resize((30, 20))))
    (tmp_path / "c.jpg").write_bytes(b"no image")
    config = digits_config(run_dir.uri, "select.method=coverage")
    uris = {i: str(tmp_path / name) for i, name in enumerate(["a.jpg", "b.png", "c.jpg", "missing.jpg"])}
    made = make_thumbnails(config, run_dir, uris, **LIMITS)
    assert {i: open_proxy_image(image).size for i, image in made.items()} == {0: (64, 43), 1: (30, 20)}


def test_thumbnails_end_where_the_seconds_are_used_up(run_dir, monkeypatch):
    monkeypatch.setattr(thumbnails, "BATCH", 10)
    uris = {i: f"/digits/{i}.png" for i in range(100, 300)}
    made = make_thumbnails(digits_config(run_dir.uri), run_dir, uris, **(LIMITS | {"max_seconds": 0.0}))
    assert list(made) == list(range(100, 100 + 10 * thumbnails.THREADS))  # what had begun


def test_accuracies_are_those_of_this_coreset(run_dir):
    config = digits_config(run_dir.uri)
    run.run_report(config, run_dir)
    assert "test_accuracy" not in json.loads(filesystem.read_bytes(run_dir.path("metrics.json")))
    trials = [("elfs", "0.2", 0.75), ("elfs", "0.2", 0.85), ("random", "0.2", 0.7), ("random", "0.1", 0.1)]
    rows = [{"selection": name, "budget": budget, "last_accuracy": accuracy} for name, budget, accuracy in trials]
    results = run_dir.path(schema.EVALUATE_DIR, schema.RESULTS_FILE)
    filesystem.write_table(results, pa.Table.from_pylist(rows, schema=schema.RESULTS_SCHEMA))
    run.run_report(config, run_dir)
    metrics = json.loads(filesystem.read_bytes(run_dir.path("metrics.json")))
    assert metrics["test_accuracy"] == pytest.approx({"elfs": 0.8, "random": 0.7})
    assert "<b>80.0%</b> right" in filesystem.read_bytes(run_dir.path("report.html")).decode()
    os.utime(results, (1, 1))  # before the coreset was made again
    run.run_report(config, run_dir)
    assert "test_accuracy" not in json.loads(filesystem.read_bytes(run_dir.path("metrics.json")))
