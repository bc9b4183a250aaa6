"""Runs whose pool changes, up to the embeddings: which images are listed and embedded, and what is refused."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.config import Config, ConfigError
from elfs_ray.evaluation.probe import _embeddings_of, _refuse_rejected
from elfs_ray.evaluation.true_labels import NO_LABEL, list_labels
from elfs_ray.pipeline.plan import check, wanted_marker
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.stages.embed import EmbedResult, num_selectable, worker
from elfs_ray.stages.index import IndexResult, records
from elfs_ray.stages.index import run as index
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from tests.in_process import run_here
from tests.tables import contents, digit_images, digits_config, png

TABLES = ("index", "gone", "embeddings", "rejected")
IMAGES = [png(image) for image in digit_images(120)[0]]


@pytest.fixture
def go(monkeypatch, tmp_path) -> Callable[..., RunDir]:
    """Return a function that runs the pipeline on the pool in tmp_path / "pool", into a folder of tmp_path."""
    return lambda name="run", *keys: run_here(monkeypatch, config_of(tmp_path, name, *keys))


def config_of(folder: Path, name: str = "run", *keys: str) -> Config:
    coverage = ("budget=2", "select.method=coverage", "until=embed", "cluster.num_clusters=2")
    encoder = ("embed.image_size=8", "embed.block_images=8", "embed.runtime=torch")
    return digits_config(folder / name, f"pool.uri={folder}/pool", *coverage, *encoder, *keys)


def write_images(pool: Path, numbers: range) -> None:
    pool.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (pool / f"{number:03d}.png").write_bytes(IMAGES[number])


def rows(run_dir: RunDir, table: str) -> dict:
    return pa.concat_tables(run_dir.read_table(table)).to_pydict()


def by_uri(run_dir: RunDir, root: Path) -> dict[str, tuple]:
    """Return (label, embedding or reason for the rejection) of each image by its uri within the pool."""
    of_id = dict(zip(*list(rows(run_dir, "embeddings").values()), strict=True))
    if run_dir.table_files("rejected"):
        rejected = rows(run_dir, "rejected")
        of_id |= dict(zip(rejected["sample_id"], rejected["reason"], strict=True))
    table = rows(run_dir, "index")
    columns = zip(table["sample_id"], table["uri"], table["label"], strict=True)
    return {uri.removeprefix(str(root)): (label, of_id[sample_id]) for sample_id, uri, label in columns}


def actions(folder: Path, *keys: str) -> list[tuple[str, str]]:
    plan = check(config_of(folder, "run", *keys), RunDir(folder / "run"))
    return [(planned.action, " ".join(planned.differences)) for planned in plan]


def write_bytes_parquet(path: Path, numbers: range) -> None:
    pq.write_table(pa.table({"image": [IMAGES[i] for i in numbers], "y": [i % 3 for i in numbers]}), path)


def write_uris_parquet(path: Path, numbers: range) -> None:
    write_images(path.parent.parent / "images", numbers)
    uris = [f"../images/{i:03d}.png" for i in numbers]
    pq.write_table(pa.table({"uri": uris, "y": [i % 3 for i in numbers]}), path)


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            file = path.parent.parent / f"{number:03d}.png"
            file.write_bytes(IMAGES[number])
            archive.add(file, f"{number:03d}.png")


FORMATS = {"bytes": (write_bytes_parquet, "parquet"), "uri": (write_uris_parquet, "parquet"), "tar": (write_tar, "tar")}


def test_a_pool_that_grew_in_five_steps_has_the_tables_of_a_whole_one(go, tmp_path):
    (tmp_path / "pool" / "9").mkdir(parents=True)
    (tmp_path / "pool" / "9" / "empty.png").write_bytes(b"")
    before: dict[str, bytes] = {}
    for step in range(5):
        for label in range(2):
            write_images(tmp_path / "pool" / str(label), range(20 * step + 10 * label, 20 * step + 10 * label + 10))
        run_dir = go("run", "pool.label=folder")
        after = contents(tmp_path / "run", "index", "embeddings", "rejected")
        assert before.items() <= after.items()
        before = after
    assert IndexResult.read(run_dir).ends == [21, 41, 61, 81, 101]
    assert rows(run_dir, "index")["sample_id"] == list(range(101))
    whole = go("whole", "pool.label=folder")
    assert by_uri(run_dir, tmp_path / "pool") == by_uri(whole, tmp_path / "pool")
    assert all(action == ("done", "") for action in actions(tmp_path, "pool.label=folder"))


@pytest.mark.parametrize("kind", FORMATS)
def test_files_with_several_images_grow_change_and_go(go, tmp_path, kind, monkeypatch):
    write, suffix = FORMATS[kind]
    (tmp_path / "pool").mkdir()
    for number in range(3):
        write(tmp_path / "pool" / f"{number}.{suffix}", range(10 * number, 10 * number + 10))
    go()
    before = contents(tmp_path / "run", *TABLES)
    write(tmp_path / "pool" / f"3.{suffix}", range(30, 35))
    write(tmp_path / "pool" / f"1.{suffix}", range(10, 21))
    (tmp_path / "pool" / f"2.{suffix}").unlink()
    # The rows of a file that was written again have changed, unless they name images that did not.
    told = "5 new, 9 gone" if kind == "uri" else "5 new, 10 gone, 11 changed"
    assert actions(tmp_path, "on_pool_change=extend")[0] == ("extend", f"the pool has changed: {told}")
    read = []
    monkeypatch.setattr(index, "list_unit", lambda unit, *rest: read.append(unit.uri) or list_unit(unit, *rest))
    run_dir = go("run", "on_pool_change=extend")
    assert before.items() < contents(tmp_path / "run", *TABLES).items()
    names = {Path(uri).stem for uri in read}
    assert names == ({"0", "1", "3"} if kind == "uri" else {"1", "3"})
    gone = rows(run_dir, "gone")["sample_id"]
    assert gone == ([*range(21, 30)] if kind == "uri" else [*range(10, 30)])
    whole = go("whole")
    grown, fresh = by_uri(run_dir, tmp_path), by_uri(whole, tmp_path)
    if kind == "uri":
        assert {uri: grown[uri] for uri in fresh} == fresh
    assert num_selectable(run_dir) == EmbedResult.read(whole).rows == 26
    assert all(action == ("done", "") for action in actions(tmp_path))


list_unit = index.list_unit


def test_a_bucket_grows_and_an_object_changes(monkeypatch, tmp_path, s3_server, s3_bucket):
    def write(numbers: range) -> None:
        for number in numbers:
            filesystem.write_bytes(f"{s3_bucket}/{number % 2}/{number}.png", IMAGES[number])

    config = config_of(tmp_path, "run", f"pool.uri={s3_bucket}")
    write(range(20))
    run_dir = run_here(monkeypatch, config)
    write(range(20, 24))
    filesystem.delete(f"{s3_bucket}/0/0.png")
    filesystem.write_bytes(f"{s3_bucket}/1/1.png", IMAGES[50])
    before = s3_server.num_requests()
    assert check(config, run_dir)[0].differences == ("the pool has changed: 4 new, 1 gone, 1 changed",)
    assert s3_server.num_requests() - before < 15  # far fewer than objects: listings alone
    run_here(monkeypatch, config)
    assert num_selectable(run_dir) == 23 and rows(run_dir, "gone")["sample_id"] == [0, 10]


def test_a_tar_that_is_back_has_its_ids_again(go, tmp_path):
    (tmp_path / "pool").mkdir()
    for number in range(4):
        write_tar(tmp_path / "pool" / f"{number}.tar", range(10 * number, 10 * number + 10))
    go()
    before = contents(tmp_path / "run", *TABLES)
    (tmp_path / "pool" / "2.tar").rename(tmp_path / "2.tar")
    run_dir = go()
    assert rows(run_dir, "gone")["sample_id"] == list(range(20, 30)) and num_selectable(run_dir) == 30
    (tmp_path / "2.tar").rename(tmp_path / "pool" / "2.tar")
    assert actions(tmp_path) == [("extend", "the pool has changed: 10 back"), ("done", "")]
    assert num_selectable(go()) == 40 and contents(tmp_path / "run", *TABLES) == before


@pytest.mark.parametrize("killed_in", ["_write_part", "write_records", "write_gone", "mark", "embed"])
def test_a_killed_extension_resumes_with_the_same_bytes(go, tmp_path, monkeypatch, killed_in):
    write_images(tmp_path / "pool", range(30))
    go()
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    write_images(tmp_path / "pool", range(30, 60))
    for number in (3, 4):
        (tmp_path / "pool" / f"{number:03d}.png").unlink()
    go("undisturbed")
    place, name = {
        "embed": (worker, "_write_embeddings"),
        "mark": (RunDir, "mark_complete"),
    }.get(killed_in, (index, killed_in))
    done = getattr(place, name)

    def work_and_stop(*arguments):
        done(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, work_and_stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    go()
    assert contents(tmp_path / "run", *TABLES) == contents(tmp_path / "undisturbed", *TABLES)
    assert actions(tmp_path) == [("done", ""), ("done", "")]


def test_a_run_that_recorded_no_files_compares_uris_and_records_them(go, tmp_path):
    write_images(tmp_path / "pool", range(10))
    run_dir = go()
    marker = run_dir.complete_marker(IndexResult.stage)
    shutil.rmtree(tmp_path / "run" / "index" / "_files")
    result = {key: value for key, value in marker.result.items() if key not in ("ends", "gone")}
    old = marker.__class__(**{**vars(marker), "result": result, "outputs": run_dir.measure(marker.outputs)})
    run_dir.mark_complete(old)
    os.utime(tmp_path / "pool" / "001.png", ns=(1, 1))
    assert actions(tmp_path) == [("done", ""), ("done", "")]
    (tmp_path / "pool" / "000.png").unlink()
    write_images(tmp_path / "pool", range(10, 12))
    assert actions(tmp_path)[0] == ("extend", "the pool has changed: 2 new, 1 gone")
    go()
    os.utime(tmp_path / "pool" / "001.png", ns=(2, 2))
    assert actions(tmp_path)[0] == ("extend", "the pool has changed: 1 changed")


def test_a_container_of_an_old_run_is_known_by_its_uri(go, tmp_path):
    (tmp_path / "pool").mkdir()
    write_tar(tmp_path / "pool" / "0.tar", range(10))
    run_dir = go()
    before = IndexResult.read(run_dir)
    old = IndexResult(before.rows, before.units, before.format, [])
    read = records.read_records(run_dir, old, [index.Unit("webdataset", f"{tmp_path}/pool/0.tar")])
    assert read.files.rows.tolist() == [10] and read.first_ids.tolist() == [0]


def test_an_image_gone_before_it_was_embedded_is_new_when_it_is_back(go, tmp_path):
    write_images(tmp_path / "pool", range(10))
    go("run", "until=index")
    (tmp_path / "pool" / "004.png").rename(tmp_path / "004.png")
    run_dir = go()
    assert rows(run_dir, "gone")["sample_id"] == rows(run_dir, "rejected")["sample_id"] == [4]
    assert num_selectable(run_dir) == 9
    (tmp_path / "004.png").rename(tmp_path / "pool" / "004.png")
    assert num_selectable(go()) == 10
    assert rows(run_dir, "gone")["sample_id"] == [4] and rows(run_dir, "index")["uri"][-1].endswith("/004.png")


def test_a_pool_that_lost_more_than_half_is_refused(go, tmp_path):
    write_images(tmp_path / "pool", range(10))
    go()
    for number in range(6):
        (tmp_path / "pool" / f"{number:03d}.png").rename(tmp_path / f"{number:03d}.png")
    with pytest.raises(ConfigError, match=r"6 gone\. 6 of 10 images are gone.*mounted.*=keep.*=extend"):
        actions(tmp_path)
    assert actions(tmp_path, "on_pool_change=keep") == [("done", ""), ("done", "")]
    assert actions(tmp_path, "on_pool_change=extend")[0][0] == "extend"
    shutil.rmtree(tmp_path / "pool")
    with pytest.raises(ConfigError, match=r"does not exist.*10 images were listed here.*on_pool_change=keep"):
        actions(tmp_path)
    (tmp_path / "pool").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        actions(tmp_path, "on_pool_change=extend")
    assert actions(tmp_path, "on_pool_change=keep") == [("done", ""), ("done", "")]


def test_any_change_is_refused_where_that_was_asked_for(go, tmp_path):
    write_images(tmp_path / "pool", range(10))
    go("run", "on_pool_change=refuse")
    write_images(tmp_path / "pool", range(10, 11))
    with pytest.raises(ConfigError, match=r"has changed since this run listed it: 1 new\. Give on_pool_change=extend"):
        go("run", "on_pool_change=refuse")


def test_a_trained_run_keeps_to_its_images_unless_told(go, tmp_path):
    write_images(tmp_path / "pool", range(20))
    trained = ("select.method=double_end", "select.hard_fraction=0", "train.network=linear")
    run_dir = go("run", *trained)
    complete(config_of(tmp_path, "run", *trained, "until=null"), run_dir)
    assert {action for action, _ in actions(tmp_path, *trained, "until=null")} == {"done"}
    write_images(tmp_path / "pool", range(20, 22))
    kept = actions(tmp_path, *trained, "until=null")
    assert {action for action, _ in kept} == {"done"}
    assert kept[0][1] == (
        "the pool has changed: 2 new; not followed, as train would train from the start; "
        "on_pool_change=extend does that"
    )
    extended = actions(tmp_path, *trained, "until=null", "on_pool_change=extend")
    assert [action for action, _ in extended] == ["extend", "extend", "update", "update", "update", "update"]
    assert extended[3][1] == "as the pool has changed, it runs again from the start, which took 2:00:00 the last time"
    # Where images are only gone, nothing is trained.
    for number in range(20, 22):
        (tmp_path / "pool" / f"{number:03d}.png").unlink()
    (tmp_path / "pool" / "000.png").unlink()
    gone = [action for action, _ in actions(tmp_path, *trained, "until=null")]
    assert gone == ["extend", "done", "done", "done", "update", "update"]


def complete(config: Config, run_dir: RunDir) -> None:
    """Mark the stages after embed as complete, as if they had taken two hours each."""
    markers = {}
    for stage in stages_of(config):
        markers[stage.name] = run_dir.success_marker(stage.name) or wanted_marker(stage, config, markers)
        if run_dir.success_marker(stage.name) is None:
            marker = markers[stage.name]
            results = {"train": {"rows": 20, "epochs": 1, "workers": 1, "reading": "memory", "history": []}}
            results["cluster"] = {"rows": 20, "num_clusters": 2, "method": "kmeans", "workers": 1, "sizes": [10, 10]}
            fields = vars(marker) | {"result": results.get(stage.name, {}), "seconds": 7200.0}
            markers[stage.name] = marker.__class__(**fields | {"outputs": run_dir.measure(marker.outputs)})
            run_dir.mark_complete(markers[stage.name])


def test_an_update_that_was_killed_while_it_deleted_goes_on(go, tmp_path, monkeypatch):
    from elfs_ray.pipeline.replace import remove_stage

    write_images(tmp_path / "pool", range(20))
    trained = ("select.method=double_end", "select.hard_fraction=0", "train.network=linear")
    run_dir = go("run", *trained)
    config = config_of(tmp_path, "run", *trained, "until=null", "on_pool_change=extend")
    filesystem.write_bytes(run_dir.path("clusters", "centroids.parquet"), b"x")
    complete(config, run_dir)
    write_images(tmp_path / "pool", range(20, 22))
    go("run", *trained, "on_pool_change=extend")
    plan = check(config, run_dir)
    assert [planned.action for planned in plan] == ["done", "done", "update", "update", "update", "update"]

    def stop(uri: str) -> None:
        done(uri)
        if uri.endswith("/clusters"):
            raise KeyboardInterrupt

    done = filesystem.delete
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "delete", stop)
        with pytest.raises(KeyboardInterrupt):
            remove_stage(plan[2].stage, plan[2].marker, run_dir, pool_changed=True)
    assert run_dir.success_marker("cluster") is None
    again = [planned.action for planned in check(config, run_dir)]
    assert again == ["done", "done", "update", "update", "update", "update"]


def test_test_images_that_changed_have_their_new_embeddings(go, tmp_path):
    write_images(tmp_path / "pool", range(10))
    (tmp_path / "pool" / "003.png").write_bytes(b"broken")
    go()
    (tmp_path / "pool" / "003.png").write_bytes(IMAGES[3])
    (tmp_path / "pool" / "005.png").unlink()
    write_images(tmp_path / "pool", range(10, 12))
    run_dir = go()
    _refuse_rejected("pool", run_dir)
    uris = pa.chunked_array([[f"{tmp_path}/pool/{number:03d}.png" for number in (10, 3, 4)]])
    of_uri = by_uri(run_dir, tmp_path / "pool")
    expected = [of_uri[f"/{number:03d}.png"][1] for number in (10, 3, 4)]
    assert _embeddings_of(uris, run_dir).tolist() == expected


def test_labels_of_a_grown_pool_are_matched_by_uri(go, tmp_path):
    for label in range(2):
        write_images(tmp_path / "pool" / str(label), range(5 * label, 5 * label + 5))
    go()
    (tmp_path / "pool" / "0" / "000.png").unlink()
    write_images(tmp_path / "pool" / "0", range(10, 12))
    run_dir = go()
    labels = list_labels(run_dir, f"{tmp_path}/pool", "folder", PoolColumns(label="folder"))
    assert labels.of_id.tolist() == [NO_LABEL, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0] and labels.names == ("0", "1")
    (tmp_path / "pool" / "1" / "005.png").unlink()
    with pytest.raises(ValueError, match="no longer lists the images"):
        list_labels(run_dir, f"{tmp_path}/pool", "folder", PoolColumns(label="folder"))
