"""What is deleted before a stage reruns, and a run that is killed while it deletes."""

import contextlib
from dataclasses import replace

import pytest

from elfs_ray.config import Config, ConfigError
from elfs_ray.pipeline.plan import make_plan, refuse_differences
from elfs_ray.pipeline.replace import remove_stage
from elfs_ray.stages import copy, embed, index
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import Marker, RunDir
from tests.tables import digits_config


def actions(config: Config, run_dir: RunDir) -> dict[str, str]:
    return {planned.stage.name: planned.action for planned in make_plan(config, run_dir)}


def complete(config: Config, run_dir: RunDir) -> None:
    """Mark every stage as complete, with a file in each of its tables."""
    for planned in make_plan(config, run_dir):
        for table in planned.stage.tables(config):
            filesystem.write_bytes(run_dir.path(table, "part-000000000000-000000000009.parquet"), b"rows")
        for name in planned.stage.files(config):
            filesystem.write_bytes(run_dir.path(name), b"text")
        run_dir.mark_started(planned.marker)
        run_dir.mark_complete(replace(planned.marker, outputs=run_dir.measure(planned.marker.outputs)))


@pytest.mark.parametrize("num_deleted", [1, 2, 3])
def test_a_kill_while_tables_are_removed_never_leaves_a_result(tmp_path, monkeypatch, num_deleted):
    config, run_dir = digits_config(tmp_path, "until=cluster"), RunDir(tmp_path)
    complete(config, run_dir)
    assert set(actions(config, run_dir).values()) == {"done"}
    filesystem.write_bytes(run_dir.path("index", "part-000000000000-000000000009.parquet"), b"cut")
    (planned, *later) = make_plan(config, run_dir)
    assert [stage.action for stage in (planned, *later)] == ["rerun"] * 3
    assert later[0].differences == ("made from another index",)

    deleted: list[str] = []
    delete = filesystem.delete

    def delete_or_die(uri: str) -> None:
        if len(deleted) == num_deleted:
            raise KeyboardInterrupt
        deleted.append(uri)
        delete(uri)

    monkeypatch.setattr(filesystem, "delete", delete_or_die)
    with contextlib.suppress(KeyboardInterrupt):
        remove_stage(planned.stage, planned.marker, run_dir)
    of_index, *of_later = actions(config, run_dir).values()
    assert set(of_later) == {"rerun"}
    # Once nothing of it is left, there is nothing to replace.
    assert of_index == "rerun" or (of_index == "run" and not run_dir.table_files("index"))


def test_tables_without_a_marker_are_replaced_and_single_files_overwritten(tmp_path):
    config, run_dir = digits_config(tmp_path), RunDir(tmp_path)
    complete(config, run_dir)
    for stage, action in (("select", "rerun"), ("report", "run")):
        filesystem.delete(run_dir.path(stage))
        assert actions(config, run_dir)[stage] == action


def test_copies_of_another_stage_are_replaced_with_all_of_that_stage(tmp_path):
    plain, pretrained = (
        digits_config(tmp_path, "until=embed", f"embed.encoder={encoder}") for encoder in ("pixels", "self_supervised")
    )
    run_dir = RunDir(tmp_path)
    complete(plain, run_dir)
    plan = make_plan(pretrained, run_dir)
    (of_copy,) = (planned for planned in plan if planned.stage is copy.STAGE)
    assert of_copy.differences == ("proxy_images/ was written by stage embed",)
    with pytest.raises(ConfigError, match="replace copy, embed, which deletes there: embed, embeddings, proxy_im"):
        refuse_differences(plan, pretrained, run_dir)
    remove_stage(copy.STAGE, of_copy.marker, run_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert actions(pretrained, run_dir) == {"index": "done", "copy": "run", "pretrain": "run", "embed": "run"}


def test_a_table_that_another_stage_has_written_since_is_left_alone(tmp_path):
    """Embed had written the copies, they were deleted by hand, and then an encoder was pretrained on new ones."""
    config, run_dir = digits_config(tmp_path, "until=embed"), RunDir(tmp_path)
    complete(config, run_dir)
    run_dir.mark_complete(Marker("copy", {}, {}, outputs=run_dir.measure(["proxy_images"])))
    wanted = Marker("embed", {}, {}, outputs={"embeddings": {}, "rejected": {}})
    remove_stage(embed.STAGE, wanted, run_dir)
    assert (tmp_path / "proxy_images").exists() and not (tmp_path / "embeddings").exists()
    assert run_dir.complete_marker(index.STAGE.name) and run_dir.complete_marker("copy")
