"""Commands and jobs on the command line: --help, --dry-run, errors and exit codes."""

import operator
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from elfs_ray.cli import read_arguments
from elfs_ray.commands import COMMANDS, main, select
from elfs_ray.config import Config, describe_keys, fields_of, load_config
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.presets import NAMES, preset
from tests.tables import digit_images, png

JOBS = Path(__file__).parent.parent.parent / "jobs"
PAPERS = tuple(name for name in NAMES if name != "photos")


def run_job_here(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a job's script in this process, as starting one takes seconds. Return its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def type_job(
    name: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(JOBS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, cwd=cwd)


def type_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python -m elfs_ray` in a process of its own."""
    command = [sys.executable, "-m", "elfs_ray", *arguments]
    env = os.environ | {"PYTHONPATH": str(JOBS.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, cwd=cwd)


@pytest.fixture
def pool(tmp_path) -> Path:
    images, _ = digit_images(40)
    (tmp_path / "pool").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "pool" / f"{number}.png").write_bytes(png(image))
    return tmp_path / "pool"


@pytest.mark.parametrize("name", PAPERS)
def test_every_yaml_holds_the_settings_of_the_paper(name):
    config = load_config(preset(name), ["run_dir=/run", "pool.uri=/pool"])
    imagenet = name == "imagenet"
    train, embed, evaluate = config.train, config.embed, config.evaluate
    assert train.network == evaluate.network == ("resnet34" if imagenet else "resnet18")
    assert train.epochs == (60 if imagenet else 200)
    assert (train.batch_size, train.lr, train.min_lr, train.momentum) == (256, 0.1, 1e-4, 0.9)
    assert (train.weight_decay, train.nesterov) == ((1e-4, False) if imagenet else (5e-4, True))
    assert (train.augmentation, train.crop_padding) == ("resized_crop_flip" if imagenet else "crop_flip", 4)
    assert (embed.encoder, embed.image_size) == ("timm/vit_base_patch16_224.dino", 224)
    assert embed.resize == (256 if imagenet else None)
    assert train.image_size == (224 if imagenet else None)
    assert embed.proxy_image_size == {"imagenet": 256, "stl10": 96}.get(name, 32)
    assert (config.cluster.method, config.cluster.temi.profile) == ("temi", "paper")
    assert config.cluster.num_clusters == {"imagenet": 1000, "cifar100": 100}.get(name, 10)
    assert config.select.score == ("forgetting" if name == "cifar100" else "aum")
    assert config.budget == 0.1
    assert config.select.hard_fraction == {"imagenet": 0.3, "cifar100": 0.7}.get(name, 0.4)
    assert (evaluate.iterations, evaluate.batch_size) == (300_000 if imagenet else 40_000, 256)


PRINTS = """
import sys
from elfs_ray.cli import report_errors
from elfs_ray.runtime.progress import Progress, say

def job():
    for number in range(3):
        say(f"stage {number} of /päth/猫/\\udcff")
        with Progress("embed", 10, "images") as progress:
            progress.advance(10, "猫")
    open(sys.argv[1], "w").close()
    print("coreset  /päth/猫/\\udcff")

sys.exit(report_errors(job))
"""


@pytest.mark.parametrize(
    ("stdout", "stderr", "encoding", "unbuffered"),
    [
        *(("", "2>err", encoding, "") for encoding in ("ascii", "latin-1", "utf-8", None)),
        *(("| true", "2>err", "ascii", unbuffered) for unbuffered in ("", "1")),
        *(("", stderr, "ascii", "") for stderr in ("2> >(true)", "2>&-", "2>/dev/full")),
        *((">&-", stderr, "ascii", "") for stderr in ("2>err", "2>&-")),
        ("2>&1 | true", "", "ascii", ""),
    ],
)
def test_a_job_ends_well_wherever_its_output_goes(tmp_path, stdout, stderr, encoding, unbuffered):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    env |= {"LC_ALL": "C", "PYTHONPATH": str(JOBS.parent), "PYTHONUNBUFFERED": unbuffered}
    env |= {"PYTHONIOENCODING": encoding} if encoding else {}
    # The reader of a pipe is gone before the job prints.
    command = f'(sleep 0.2; "$0" "$@" {stderr}) {stdout}; exit ${{PIPESTATUS[0]}}'
    done = tmp_path / "done"
    job = ["bash", "-c", command, sys.executable, "-c", PRINTS, str(done)]
    end = subprocess.run(job, cwd=tmp_path, env=env, stdout=subprocess.PIPE, timeout=100)
    assert (end.returncode, done.exists()) == (0, True), (tmp_path / "err").read_text()
    if not stdout:
        assert end.stdout.startswith(b"coreset  /p") and end.stdout.endswith(b"/\\udcff\n")
    if stderr == "2>err":
        assert (tmp_path / "err").read_bytes().count(b"embed") == 3


@pytest.mark.parametrize("error", ["BrokenPipeError('a store')", "OSError('disk')"])
def test_a_broken_connection_is_no_closed_pipe(error):
    script = (
        f"import sys; from elfs_ray.cli import report_errors\ndef job(): raise {error}\nsys.exit(report_errors(job))"
    )
    env = os.environ | {"PYTHONPATH": str(JOBS.parent)}
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=100)
    assert end.returncode == 1 and end.stderr.startswith("failed: ")


def test_the_rates_in_the_comment_of_cifar100_are_those_of_the_paper():
    rates = [line[1:].split() for line in preset("cifar100").read_text().splitlines() if "budget=[" in line]
    config = load_config(preset("cifar100"), ["run_dir=/run", "pool.uri=/pool", *rates[0]])
    assert (config.budgets, config.hard_fractions) == ([0.7, 0.5, 0.3, 0.2, 0.1], [0.1, 0.2, 0.4, 0.5, 0.7])


@pytest.mark.parametrize("name", [*NAMES, "quickstart"])
def test_help_all_lists_every_key_with_its_default(name, monkeypatch, capsys):
    assert run_job_here(name, "--help-all", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert all(key in said for key, _, _ in describe_keys())
    assert "default: required" in said or name == "quickstart"


@pytest.mark.parametrize("command", ["select", "reselect", "evaluate", "report", "prepare"])
def test_help_fits_a_screen_and_names_keys_that_exist(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 30
    assert max(map(len, said.splitlines())) <= 120 or command == "prepare"
    keys = {key for kind in (Config, EvaluateRunsConfig) for key, _ in fields_of(kind)} | {"name", "source"}
    named = {line.split("=")[0] for line in said.splitlines() if re.match(r"[a-z_.]+=", line)}
    assert named <= keys, named - keys


def test_the_commands_are_listed(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(summary) == 2 for summary in COMMANDS.values())


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["photos", "--budget", "200"], "budget", 200),
        (["--budget=0.5", "photos"], "budget", 0.5),
        (["photos", "--budget", "200", "budget=7"], "budget", 7),
        (["x/a=b", "--budget", "1"], "pool.uri", "x/a=b"),
        (["photos", "--budget", "1"], "run_dir", "elfs-ray/photos"),
        (["photos/", "--budget", "1", "--run-dir", "x"], "run_dir", "x"),
        (["photos/", "--budget", "1"], "pool.uri", "photos"),
        (["/", "--budget", "1", "run_dir=x"], "pool.uri", "/"),
        (["photos", "--budget", "1", "--embed.encoder", "pixels"], "embed.encoder", "pixels"),
        (["photos", "budget=1", "preset=imagenet"], "train.network", "resnet34"),
        (["photos", "--preset", "cifar10"], "budget", 0.1),
    ],
)
def test_arguments_become_keys(arguments, key, value):
    config = select.load(read_arguments(arguments, select.KEYS, "pool.uri"))
    assert operator.attrgetter(key)(config) == value


def test_the_run_directory_is_named_after_the_pool(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert select.default_run_dir("rows.parquet") == select.default_run_dir("../deep/rows/") == "elfs-ray/rows"
    for pool in ("s3://bucket/photos", "[a,b]", "photos/*"):
        assert select.default_run_dir(pool) is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert select.default_run_dir("photos") is None


def test_dry_run_prints_the_plan_and_does_nothing(pool, tmp_path):
    arguments = [f"pool.uri={pool}", f"run_dir={tmp_path / 'run'}", "embed.encoder=pixels", "embed.num_workers=2"]
    result = type_job("cifar10", "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert "40 images" in result.stdout and "resnet18, 200 epochs" in result.stdout
    assert "4 images (10.00%)" in result.stdout
    assert "2 encoders of 1 CPU, tasks of 1 CPU" in result.stdout and "GPU" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_dry_run_of_the_demo_writes_no_digits_and_the_run_does(tmp_path):
    """The run has a budget that is refused once the digits exist, so that nothing is trained."""
    plan = type_job("quickstart", "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "4,000 images in runs/digits/pool.parquet" in plan.stdout and "40 images (1.00%)" in plan.stdout
    assert "budget is 4001" in type_job("quickstart", "--dry-run", "budget=4001", cwd=tmp_path).stderr
    assert list(tmp_path.iterdir()) == []
    digits = tmp_path / "runs" / "digits"
    digits.mkdir(parents=True)
    (digits / "test.parquet").write_text("mine")
    result = type_job("quickstart", "budget=4001", cwd=tmp_path)
    assert (result.returncode, "writing 5,000 digits to runs/digits" in result.stderr) == (2, True), result.stderr
    assert (
        pq.read_metadata(digits / "pool.parquet").num_rows == 4000 and (digits / "test.parquet").read_text() == "mine"
    )
    (digits / "test.parquet").unlink()
    type_job("quickstart", "budget=4001", cwd=tmp_path)
    assert pq.read_metadata(digits / "test.parquet").num_rows == 1000


@pytest.mark.parametrize(
    ("option", "uri"), [("--dry-run", "photos/pool.parquet"), ("seed=0", "s3:/bucket/pool.parquet")]
)
def test_the_demo_writes_no_digits_for_another_pool(tmp_path, option, uri):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "test.parquet").write_text("mine")
    result = type_job("quickstart", option, f"pool.uri={uri}", "evaluate.test_uri=photos", cwd=tmp_path)
    assert result.returncode == 2 and "error: " in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "test.parquet"]
    assert (tmp_path / "photos" / "test.parquet").read_text() == "mine"


def test_the_dry_run_refuses_a_missing_gpu(pool, tmp_path):
    arguments = [f"pool.uri={pool}", f"run_dir={tmp_path / 'run'}", "embed.encoder=pixels", "ray_address=local"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = type_job("cifar10", "--dry-run", "train.device=cuda", *arguments, env=environment)
    assert result.returncode == 2
    assert "train.device=cuda, but there is no GPU on this machine" in result.stderr


def test_help_piped_into_head_is_no_error():
    command = f"{sys.executable} {JOBS / 'imagenet.py'} --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["train.epoch=3"], "did you mean train.epochs"),
        (["--fast"], "unknown option --fast"),
        (["--budgt", "3"], "unknown option --budgt, did you mean --budget?"),
        (["--budget"], "--budget has no value"),
        (["photos", "pictures"], "'pictures': pool.uri is set already"),
        (["preset=imagnet"], "no preset named 'imagnet', did you mean imagenet?"),
        ([], "no value for pool.uri, run_dir: give pool.uri=... run_dir=..., such as `elfs-ray select photos"),
        (["s3://bucket/photos"], "no value for run_dir"),
        (["/tmp", "run_dir=/none", "embed.encoder=swav_resnet50"], "embed.encoder=swav_resnet50: "),
        (["pool.uri=/no/such/place", "run_dir=/none", "embed.encoder=pixels"], "does not exist"),
    ],
)
def test_a_bad_command_ends_with_one_message_and_exit_code_2(arguments, needed, monkeypatch, capsys):
    assert run_job_here("cifar10", *arguments, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert needed in said and "Traceback" not in said
