"""`elfs-ray report`: the page of a finished run, written again."""

import json
import shutil

import pytest

from elfs_ray.commands import main
from elfs_ray.pipeline.plan import make_plan
from elfs_ray.pipeline.settle import settle
from elfs_ray.storage.run_dir import RunDir
from tests.small_run import config_of


@pytest.fixture
def finished(small_run, tmp_path):
    return shutil.copytree(small_run.run_dir, tmp_path / "run")


def test_a_lost_report_is_written_again_and_the_run_stays_complete(finished, small_run, capsys):
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"report   {finished}/report.html\n"
    assert json.loads((finished / "metrics.json").read_text()) == metrics
    config, _ = settle(config_of(small_run.pool, finished), RunDir(finished))
    plan = make_plan(config, RunDir(finished))
    assert {planned.action for planned in plan} == {"done"}


def test_fewer_images_are_shown_on_request(finished):
    before = (finished / "report.html").read_text().count("data:image/")
    assert main(["report", str(finished), "report.images_per_grid=2"]) == 0
    assert 0 < (finished / "report.html").read_text().count("data:image/") < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no value for run_dir"),
        (["{run}", "budget=3"], "budget cannot be set here: a report takes run_dir, report.images_per_grid"),
        (["{run}/none"], "no complete stage index"),
        (["{run}", "--dry-run"], "unknown option --dry-run"),
    ],
)
def test_a_bad_command_is_refused(finished, arguments, message, capsys):
    assert main(["report", *(argument.format(run=finished) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (finished / "none").exists()
