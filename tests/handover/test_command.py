"""elfs-ray export: what is typed becomes an export, and what cannot be one message."""

import json
from pathlib import Path

import pytest

from elfs_ray.commands import main
from elfs_ray.storage.run_dir import RunDir
from tests.handover.runs import write_coreset, write_run


@pytest.fixture
def run(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    uris = ["/home/me/a.jpg", "/home/me/b.jpg", "/mnt/c.jpg"]
    write_run(run_dir, uris, ids=[2, 0, 1])
    write_coreset(RunDir(run_dir.path("coresets", "round2")), uris, ids=[1, 2, 0])
    return run_dir.uri


def test_an_export_is_written_and_its_place_printed(run, capsys):
    arguments = ["export", run, "--to", "label-studio", "--coreset=round2", "--root", "/data"]
    assert main([*arguments, "--map", "/home/me=/data/photos", "--map", "/mnt=s3://b=c/x"]) == 0
    path = Path(run, "coresets", "round2", "export", "coreset", "label-studio.json")
    assert capsys.readouterr().out == f"exported {path}\n"
    assert [task["data"]["image"] for task in json.loads(path.read_text())] == [
        "/data/local-files/?d=photos/b.jpg",
        "s3://b=c/x/c.jpg",
        "/data/local-files/?d=photos/a.jpg",
    ]


def test_keys_may_be_written_without_dashes(run, tmp_path):
    assert main(["export", f"run_dir={run}", "to=csv", f"out={tmp_path / 'list.csv'}"]) == 0
    assert len((tmp_path / "list.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no value for run_dir: give elfs-ray export RUN_DIR"),
        (["{run}"], "no value for to: give --to label-studio"),
        (["{run}", "--to", "cvat", "--map", "/a"], "map='/a': give FROM=TO"),
        (["{run}", "--to", "cvat", "roots=/a"], "unknown key roots, did you mean root?"),
        (["{run}", "--to", "csv", "--dry-run"], "unknown option --dry-run"),
        (["{run}", "--to", "excel"], "to='excel' is no format: give one of label-studio"),
        (["{run}", "--to", "csv", "--coreset", "round3"], "give one of coreset, coresets/round2"),
    ],
)
def test_a_bad_command_ends_with_one_message_and_exit_code_2(run, capsys, arguments, message):
    assert main(["export", *(argument.format(run=run) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not Path(run, "export").exists()
