"""jobs/reselect.py as a user types it: another coreset next to the first one, which stays as it was."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from elfs_ray.config import ConfigError, deciding_keys
from elfs_ray.methods.selection.coverage import facility_location
from elfs_ray.pipeline import reselect
from elfs_ray.stages.select import SelectResult
from elfs_ray.stages.select import run as select
from elfs_ray.storage.run_dir import Marker, RunDir
from tests.tables import around_mean, contents, digits_config, embeddings_of, write_trained

JOB = Path(__file__).parent.parent.parent / "jobs" / "reselect.py"


def type_job(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> Path:
    """Return a run directory in which stage select is complete."""
    folder = tmp_path_factory.mktemp("finished")
    run_dir, config = RunDir(folder), digits_config(folder, "select.search_iterations=7")
    write_trained(run_dir)
    run_dir.mark_complete(replace(run_dir.complete_marker("index"), config={"pool.uri": "/no/pool"}))
    keys = {f"select.{key}": value for key, value in deciding_keys(config.select).items()}
    for stage in ("embed", "train"):
        section = {f"{stage}.{key}": value for key, value in deciding_keys(getattr(config, stage)).items()}
        run_dir.mark_complete(replace(run_dir.complete_marker(stage), config=section))
    result = select.run_select(config, run_dir)
    run_dir.mark_complete(Marker("select", {"seed": 0, "budget": 0.2, **keys}, {}, result.to_json()))
    return folder


@pytest.mark.slow
def test_a_named_coreset_is_what_a_run_with_its_keys_would_select(finished, tmp_path):
    """The coreset of the run itself stays."""
    before = contents(finished, "coreset", "scores")
    keys = ["select.score=el2n", "budget=[0.1,0.3]", "select.balance=true"]
    result = type_job(f"run_dir={finished}", "name=el2n", "ray_address=local", *keys)
    assert result.returncode == 0, result.stderr
    assert f"coreset  {finished}/coresets/el2n/coreset.txt  (100 images)" in result.stdout
    assert f"coreset  {finished}/coresets/el2n/coreset-0.3.txt  (300 images)" in result.stdout
    assert contents(finished, "coreset", "scores") == before
    write_trained(RunDir(tmp_path))
    select.run_select(digits_config(tmp_path, *keys), RunDir(tmp_path))
    names = ("coreset", "coreset-0.3")
    assert contents(finished / "coresets" / "el2n", *names) == contents(tmp_path, *names)
    for name in ("coreset.txt", "coreset-0.3.txt"):
        assert (finished / "coresets" / "el2n" / name).read_bytes() == (tmp_path / name).read_bytes()

    again = type_job(f"run_dir={finished}", "name=el2n", *keys)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = type_job(f"run_dir={finished}", "name=el2n", "budget=0.1")
    assert other.returncode == 2 and "give another name, or on_change=rerun" in other.stderr


def select_again(run_dir: Path, *overrides: str) -> None:
    reselect.run(*reselect.load([f"run_dir={run_dir}", *overrides]))


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_files_without_a_marker_are_replaced_only_with_on_change_rerun(copy):
    shutil.copytree(copy / "coreset", copy / "coresets" / "mine" / "coreset")
    before = contents(copy, "coresets")
    with pytest.raises(ConfigError, match=r"coresets/mine holds files, and no marker says how .*another name"):
        select_again(copy, "name=mine", "budget=50")
    assert contents(copy, "coresets") == before
    select_again(copy, "name=mine", "budget=50", "on_change=rerun")
    assert len(RunDir(copy / "coresets" / "mine").read_column("coreset", column="sample_id")) == 50


@pytest.mark.parametrize("lost", ["coreset/part-*", "coreset-0.3/part-*", "coreset-0.3.txt"])
def test_a_coreset_with_lost_files_is_refused_and_made_again_on_request(copy, lost):
    keys, folder = ("name=x", "budget=[0.1,0.3]"), copy / "coresets" / "x"
    select_again(copy, *keys)
    whole = {path: path.read_bytes() for path in folder.glob("coreset*/part-*")}
    next(folder.glob(lost)).unlink()
    with pytest.raises(ConfigError, match=r"coresets/x is damaged: coreset\S* has 0 files.*on_change=rerun"):
        select_again(copy, *keys)
    select_again(copy, *keys, "on_change=rerun")
    assert {path: path.read_bytes() for path in folder.glob("coreset*/part-*")} == whole
    assert len((folder / "coreset-0.3.txt").read_text().splitlines()) == 300


def test_a_replaced_coreset_leaves_nothing_of_its_other_budgets(copy):
    select_again(copy, "name=x", "budget=[0.1,0.3,50]")
    select_again(copy, "name=x", "budget=[0.2,50]", "on_change=rerun")
    assert sorted(path.name for path in (copy / "coresets" / "x").glob("coreset*")) == [
        *("coreset", "coreset-50", "coreset-50.txt", "coreset.txt")
    ]
    assert len(RunDir(copy / "coresets" / "x").read_column("coreset", column="sample_id")) == 200


def test_a_killed_selection_resumes_and_another_one_there_is_refused(copy):
    keys, folder = ("name=x", "budget=[0.1,0.3]"), copy / "coresets" / "x"
    select_again(copy, *keys)
    whole = contents(copy, "coresets")
    (folder / "select" / "_SUCCESS.json").unlink()
    (folder / "coreset.txt").unlink()
    with pytest.raises(ConfigError, match="coresets/x was made with other keys"):
        select_again(copy, "name=x", "budget=0.2")
    select_again(copy, *keys)
    assert contents(copy, "coresets") == whole


def test_a_selection_that_another_driver_has_just_made_is_not_repeated(copy, monkeypatch, capsys):
    """The other driver finishes between this one's first look and its lock."""
    keys = ("name=x", "budget=0.1")
    is_done = reselect._is_done

    def other_driver_first(*arguments):
        monkeypatch.setattr(reselect, "_is_done", is_done)
        select_again(copy, *keys)
        return False

    monkeypatch.setattr(reselect, "_is_done", other_driver_first)
    select_again(copy, *keys)
    output = capsys.readouterr().err
    assert output.count("select    complete in") == 1 and "nothing to do" in output


@pytest.mark.slow
def test_auto_and_search_choose_a_hard_fraction_with_the_runs_network(finished):
    keys = ["budget=[0.1,0.3]", "select.hard_fraction=[auto,search]", "select.search_step=0.4"]
    arguments = [f"run_dir={finished}", "name=found", "ray_address=local", *keys, "select.search_iterations=3"]
    plan = type_job("--dry-run", *arguments)
    assert plan.returncode == 0, plan.stderr
    assert (
        "100 images (10.00%), after dropping the hardest (how many: estimated from the training dynamics)"
        in plan.stdout
    )
    assert "300 images (30.00%), after dropping the hardest (how many: 2 trainings of 3 steps)" in plan.stdout
    result = type_job(*arguments)
    assert result.returncode == 0, result.stderr
    first, second = SelectResult.read(RunDir(finished / "coresets" / "found")).coresets.values()
    assert first.hard_fraction_evidence["found_by"] == "auto" and 0 <= first.hard_fraction <= 0.9
    assert [trial["hard_fraction"] for trial in second.hard_fraction_evidence["trials"]] == [0.0, 0.4]
    assert (first.rows, second.rows) == (100, 300)


def test_a_reselection_has_the_search_keys_of_a_run_without_a_search(finished):
    config, _ = reselect.load([f"run_dir={finished}", "name=later", "select.hard_fraction=search"])
    assert (config.select.search_iterations, config.select.search_step) == (7, 0.1)


@pytest.mark.slow
def test_coverage_is_selected_from_a_run_that_has_trained(finished):
    result = type_job(
        f"run_dir={finished}", "name=covering", "ray_address=local", "select.method=coverage", "budget=50"
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"covers   the pool: mean similarity 0\.\d+ to the nearest image chosen", result.stdout)
    coreset = next(RunDir(finished / "coresets" / "covering").read_table("coreset"))
    expected = facility_location(around_mean(embeddings_of(RunDir(finished))), 50)
    embedded = RunDir(finished).read_column("embeddings", column="sample_id")
    assert coreset["sample_id"].to_pylist() == embedded[expected.order].tolist()
    assert coreset["pseudo_label"].null_count == 0


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(finished):
    result = type_job("--dry-run", f"run_dir={finished}", "name=dry", "budget=50")
    assert result.returncode == 0, result.stderr
    assert "coresets/dry/coreset would be written: by double_end, 50 images (5.00%)" in result.stdout
    assert not (finished / "coresets" / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=x"], "no value for run_dir"),
        (["run_dir={run}"], "no value for name"),
        (["run_dir={run}", "name=../x"], "becomes a folder's name"),
        (["run_dir={run}", "name=x", "train.epochs=3"], "train.epochs cannot be changed here"),
        (["run_dir={run}", "name=x", "select.scor=aum"], "did you mean select.score"),
        (["run_dir={run}", "name=x", "budget=0.9", "select.hard_fraction=0.5"], "or 0.1 at most"),
        (["run_dir={run}", "name=x", "budget=2000"], "between 1 and the size of the pool"),
        (["run_dir={run}", "name=x", "select.method=d2"], "give cluster.num_neighbors=10"),
        (["run_dir=/no/such", "name=x"], "no complete stage select"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_a_bad_command_ends_with_one_message_and_exit_code_2(finished, arguments, message):
    result = type_job(*(argument.format(run=finished) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
