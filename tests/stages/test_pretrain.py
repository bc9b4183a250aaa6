"""Stages copy and pretrain: an encoder from copies, the same bytes after a crash, weights for other runs."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import elfs_ray
from elfs_ray.config import Config, ConfigError
from elfs_ray.methods.encoders.encoder import load_encoder
from elfs_ray.methods.encoders.weights import read_trained_encoder
from elfs_ray.methods.simclr.training import SimclrTrainer, simclr_settings
from elfs_ray.methods.training.dynamics import BatchPlan
from elfs_ray.pipeline.dry_run import describe_plan, look
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.pretrain import PretrainResult
from elfs_ray.stages.pretrain.worker import TwoViews, pool_hash, real_views
from elfs_ray.stages.training.reader import InMemoryReader, TrainingPool
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from elfs_ray.storage.run_lock import RunLock
from tests.scripts import run_script
from tests.tables import contents, digit_images, digits_config, png
from tests.workers import training_worker_pids

SIZE = 16
NUM_DIGITS = 150
CPU = torch.device("cpu")
SETTINGS = (
    "embed.encoder=self_supervised",
    f"embed.proxy_image_size={SIZE}",
    "embed.block_images=50",
    "embed.num_workers=1",
    "pretrain.profile=cpu",
    "pretrain.epochs=3",
    "pretrain.batch_size=40",
    "pretrain.lr=0.1",
    "pretrain.flip=false",
    "pretrain.cpus_per_worker=1",
    "pretrain.max_failures=0",
    "ray_address=null",
)
JOB = Path(__file__).parent.parent.parent / "jobs" / "cifar10.py"
TABLES = ("index", "rejected", "embeddings", "proxy_images", "copy")
ENCODER = Path("pretrain", "encoder.pt")


def digits() -> np.ndarray:
    """Return real handwritten digits, (150, 16, 16, 3) uint8."""
    images = np.kron(digit_images(NUM_DIGITS)[0], np.ones((2, 2), np.uint8))
    return np.repeat(images[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """Return a folder of digits, an empty file and a text file."""
    folder = tmp_path_factory.mktemp("pool")
    for number, image in enumerate(digits()):
        (folder / f"{number:03d}.png").write_bytes(png(image))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


def config_of(pool: Path, folder: Path, *overrides: str) -> Config:
    return digits_config(folder, f"pool.uri={pool}", *SETTINGS, *overrides)


def run(pool: Path, folder: Path, *overrides: str) -> RunDir:
    return elfs_ray.run(config_of(pool, folder, "until=embed", *overrides))


def rows(folder: Path, table: str) -> pa.Table:
    return pa.concat_tables(RunDir(folder).read_table(table))


def vectors(folder: Path) -> np.ndarray:
    return np.stack(rows(folder, "embeddings")["embedding"].to_numpy()).astype(np.float64)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, pool, tmp_path_factory) -> Path:
    """Return a run that is complete up to its embeddings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(pool, folder)
    return folder


@pytest.mark.slow
def test_embedded_and_rejected_are_the_index_and_copies_are_embedded(undisturbed):
    ids = {table: rows(undisturbed, table)["sample_id"].to_pylist() for table in ("index", "embeddings", "rejected")}
    assert sorted(ids["embeddings"] + ids["rejected"]) == ids["index"] == list(range(NUM_DIGITS + 2))
    assert rows(undisturbed, "proxy_images")["sample_id"].to_pylist() == ids["embeddings"]
    rejected = {(row["stage"], row["reason"]) for row in rows(undisturbed, "rejected").to_pylist()}
    assert rejected == {("copy", "empty file (0 bytes)"), ("copy", "not an image that Pillow can read (12 bytes)")}


@pytest.mark.slow
def test_embeddings_are_what_the_file_makes_of_the_copies(undisturbed):
    """Pool, copies and encoder have the same size here: the pixels are the digits' own."""
    encoder = load_encoder("self_supervised", weights=str(undisturbed / ENCODER))
    assert encoder.input.crop == SIZE
    features = encoder.encode(digits())
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(undisturbed), expected, atol=2e-3)


@pytest.mark.slow
def test_a_worker_has_the_losses_of_a_plain_loop_over_whole_batches(undisturbed, pool):
    config = config_of(pool, undisturbed)
    settings = simclr_settings(vars(config.pretrain), SIZE)
    sample_ids = rows(undisturbed, "proxy_images")["sample_id"].to_numpy()
    everything = TrainingPool(sample_ids, np.zeros(NUM_DIGITS, np.int32), np.arange(NUM_DIGITS, dtype=np.int32))
    plan = BatchPlan(NUM_DIGITS, 38)  # 4 batches of at most 40, as even as can be: 38, 38, 38, 36
    reader = InMemoryReader(everything, digits(), TwoViews(settings.views, config.seed, SIZE), plan, CPU)
    settings = dataclasses.replace(settings, batch_size=38)  # which the learning rate is scaled by
    trainer = SimclrTrainer(settings, plan.num_steps, config.seed, device=CPU)
    history = PretrainResult.read(RunDir(undisturbed)).history
    torch.set_num_threads(1)
    for epoch in range(3):
        losses = []
        for index, (num_real, (batch,)) in enumerate(reader.steps(epoch)):
            assert batch.mask.all()
            losses.append(num_real * trainer.step(batch.inputs, [num_real], epoch=epoch, step=index)[1].item())
        # Rounding differs with the shapes of batches, and every step lets it grow.
        assert history[epoch]["loss"] == pytest.approx(sum(losses) / NUM_DIGITS, rel=(1e-4, 1e-3, 1e-2)[epoch])


@pytest.mark.slow
def test_every_epoch_has_measures_that_need_no_labels(undisturbed):
    result = PretrainResult.read(RunDir(undisturbed))
    assert (result.rows, result.epochs, result.workers, result.reading) == (NUM_DIGITS, 3, 1, "memory")
    assert [epoch["epoch"] for epoch in result.history] == [0, 1, 2]
    assert result.history[-1]["loss"] < result.history[0]["loss"] < np.log(2 * 38 - 1)
    for epoch in result.history:
        assert 0.02 < epoch["spread"] < 1 and 1.5 < epoch["effective_rank"] < 256
        assert epoch["images_per_s"] == pytest.approx(NUM_DIGITS / epoch["seconds"])


@pytest.mark.slow
def test_the_file_says_what_made_it(undisturbed):
    trained = read_trained_encoder(undisturbed / ENCODER)
    assert (trained.network, trained.image_size) == ("small_cnn", SIZE)
    assert trained.pool == pool_hash(RunDir(undisturbed))
    assert (trained.config["precision"], trained.config["workers"], trained.config["device"]) == ("fp32", 1, "cpu")
    assert (trained.config["seed"], trained.config["epochs"], trained.config["views"]["flip"]) == (0, 3, False)


def test_the_hash_of_a_pool_changes_with_an_image_in_the_same_place(ray_cluster, pool, tmp_path):
    other = tmp_path / "pool"
    shutil.copytree(pool, other)
    image = Image.open(other / "000.png").rotate(90)
    image.save(other / "000.png")
    hashes = []
    for source in (pool, other):
        moved = tmp_path / "same_place"
        moved.symlink_to(source)
        elfs_ray.run(config_of(moved, tmp_path / f"run{len(hashes)}", "until=copy"))
        hashes.append(pool_hash(RunDir(tmp_path / f"run{len(hashes)}")))
        moved.unlink()
    assert hashes[0] != hashes[1]


@pytest.mark.slow
def test_another_run_names_the_file_and_has_no_such_stages(undisturbed, pool, tmp_path, capsys):
    weights = f"embed.weights={undisturbed / ENCODER}"
    run(pool, tmp_path, weights)
    recorded = EmbedResult.read(RunDir(tmp_path)).weights
    assert recorded["sha256"] == hashlib.sha256((undisturbed / ENCODER).read_bytes()).hexdigest()
    assert (recorded["network"], recorded["pool"]) == ("small_cnn", pool_hash(RunDir(undisturbed)))
    assert not (tmp_path / "pretrain").exists() and not (tmp_path / "copy").exists()
    assert rows(tmp_path, "embeddings")["sample_id"].equals(rows(undisturbed, "embeddings")["sample_id"])
    np.testing.assert_allclose(vectors(tmp_path), vectors(undisturbed), atol=2e-3)
    assert {row["stage"] for row in rows(tmp_path, "rejected").to_pylist()} == {"embed"}
    for table in ("proxy_images", "rejected"):
        assert rows(tmp_path, table)["sample_id"].equals(rows(undisturbed, table)["sample_id"])


@pytest.mark.slow
def test_an_encoder_in_a_bucket_embeds_as_the_file_on_disk_does(undisturbed, pool, tmp_path, s3_bucket):
    filesystem.write_bytes(f"{s3_bucket}/a/encoder.pt", (undisturbed / ENCODER).read_bytes())
    for name, place in (("disk", undisturbed / ENCODER), ("bucket", f"{s3_bucket}/a/encoder.pt")):
        run(pool, tmp_path / name, f"embed.weights={place}")
    assert contents(tmp_path / "bucket", "embeddings") == contents(tmp_path / "disk", "embeddings")
    with pytest.raises(ConfigError, match=r"a/gone\.pt"):
        run(pool, tmp_path / "new", f"embed.weights={s3_bucket}/a/gone.pt")


@pytest.mark.slow
def test_images_much_larger_than_those_that_it_was_trained_on_are_refused(undisturbed, pool, tmp_path):
    with pytest.raises(ConfigError, match=r"trained on images of 16 pixels.*embed\.image_size=null"):
        run(pool, tmp_path, f"embed.weights={undisturbed / ENCODER}", "embed.image_size=33")


@pytest.mark.slow
def test_only_a_run_that_trains_an_encoder_has_two_more_stages(undisturbed, pool, tmp_path):
    def planned(*overrides: str) -> list[str]:
        lines = describe_plan(look(config_of(pool, tmp_path, *overrides))).split("\n\n")[1].splitlines()
        return [line.split()[0] for line in lines]

    others = ["index", "embed", "cluster", "train", "select", "report"]
    assert planned() == ["index", "copy", "pretrain", *others[1:]]
    assert planned("embed.encoder=pixels") == others
    assert planned(f"embed.weights={undisturbed / ENCODER}") == others


def test_days_of_work_on_cpus_are_announced(ray_cluster, pool, tmp_path, capsys):
    slow = ["pretrain.profile=gpu", "pretrain.network=null", "pretrain.epochs=null", "pretrain.device=cpu"]
    advice = "will take days on CPUs with pretrain.profile=gpu: pretrain.profile=cpu takes half an hour"
    plan = describe_plan(look(config_of(pool, tmp_path, *slow)))
    assert "SimCLR, resnet18, 400 epochs" in plan and advice in plan
    for quick in (slow[1:], [*slow, "pretrain.epochs=2"]):
        assert advice not in describe_plan(look(config_of(pool, tmp_path, *quick)))
    with RunLock(str(tmp_path), print), pytest.raises(ConfigError, match="written by another driver"):
        run(pool, tmp_path, *slow)
    assert f"pretrain  {advice}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (("embed.weights=/no/such/file.pt",), "no weights file /no/such/file.pt"),
        (("pretrain.network=resnet19",), "pretrain.network='resnet19': must be one of"),
        (("pretrain.image_size=32",), "pretrain.image_size=32 is above embed.proxy_image_size=16"),
        (("embed.image_size=32",), "embed.image_size=32 is above embed.proxy_image_size=16"),
        (("embed.resize=32",), "embed.resize=32 is above .* embed.resize=null takes the largest size that fits"),
        (("embed.encoder=pixels", "until=pretrain"), "until='pretrain': must be one of index, embed, cluster"),
        (("pretrain.compile=true", "pretrain.num_workers=2"), "give pretrain.num_workers=1"),
        ((f"embed.weights_sha256={'0' * 64}",), "this run trains the weights itself"),
        (("pretrain.temperature=0",), "pretrain.temperature=0"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(pool, tmp_path, overrides, needed):
    with pytest.raises(ConfigError, match=needed):
        elfs_ray.run(config_of(pool, tmp_path / "new", *overrides))
    assert not (tmp_path / "new").exists()


def test_weights_of_another_kind_are_refused_before_any_work(pool, tmp_path):
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"other\.pt is not an encoder that was trained on a pool"):
        elfs_ray.run(config_of(pool, tmp_path / "new", f"embed.weights={tmp_path / 'other.pt'}"))


@pytest.mark.slow
def test_copies_for_another_encoder_are_replaced_only_when_told_to(undisturbed, pool, tmp_path):
    """To an encoder that decodes for itself, and back: in neither direction is a copy left of the other's blocks."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    pixels = ("embed.encoder=pixels", "embed.image_size=16", "embed.block_images=40")
    with pytest.raises(ConfigError, match=r"proxy_images/ was written by stage copy"):
        run(pool, folder, *pixels)
    run(pool, folder, *pixels, "on_change=rerun")
    assert len(list((folder / "proxy_images").iterdir())) == 4
    assert rows(folder, "proxy_images")["sample_id"].to_pylist() == rows(folder, "embeddings")["sample_id"].to_pylist()
    with pytest.raises(ConfigError, match=r"copy: proxy_images/ was written by stage embed"):
        run(pool, folder)
    run(pool, folder, "on_change=rerun")  # copies that are made again train the encoder again
    assert contents(folder, *TABLES) == contents(undisturbed, *TABLES)
    assert (folder / ENCODER).read_bytes() == (undisturbed / ENCODER).read_bytes()


@pytest.mark.slow
def test_a_lost_encoder_is_refused_then_trained_again_to_the_same_bytes(undisturbed, pool, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / ENCODER).unlink()
    with pytest.raises(ConfigError, match=r"encoder\.pt has 0 files"):
        run(pool, tmp_path)
    run(pool, tmp_path, "on_change=rerun")
    assert (tmp_path / ENCODER).read_bytes() == (undisturbed / ENCODER).read_bytes()


def test_the_padding_of_a_batch_gives_no_views():
    pool = TrainingPool(np.arange(5), np.zeros(5, np.int32), np.arange(5, dtype=np.int32))
    views = TwoViews(simclr_settings(vars(config_of(Path("/no"), Path("/no")).pretrain), SIZE).views, 0, SIZE)
    reader = InMemoryReader(pool, digits()[:5], views, BatchPlan(5, 5, rank=0, world_size=2), CPU)
    ((num_real, (batch,)),) = list(reader.steps(0))
    assert (num_real, batch.mask.tolist(), len(batch.inputs)) == (5, [True, True, False], 6)
    assert torch.equal(real_views(batch), batch.inputs[[0, 1, 3, 4]])


@pytest.mark.slow
def test_a_worker_killed_in_an_epoch_changes_no_byte(undisturbed, pool, tmp_path):
    overrides = ("pretrain.max_failures=1", "pretrain.epochs=15")
    run(pool, tmp_path / "whole", *overrides)
    killed: list[int] = []

    def kill() -> None:
        while len(list((tmp_path / "killed" / "pretrain").glob("history/*.json"))) < 3:
            time.sleep(0.02)
        killed.append(training_worker_pids()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(pool, tmp_path / "killed", *overrides)
    killer.join()
    assert killed
    assert (tmp_path / "killed" / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()
    assert contents(tmp_path / "killed", *TABLES) == contents(tmp_path / "whole", *TABLES)


@pytest.mark.slow
def test_a_collapsed_encoder_stops_the_run_at_once_and_says_what_to_do(ray_cluster, pool, tmp_path):
    overrides = ("pretrain.weight_decay=5", "pretrain.lr=0.5", "pretrain.epochs=60", "pretrain.max_failures=-1")
    with pytest.raises(RuntimeError, match=r"the encoder collapsed in epoch \d+: .* Lower pretrain\.lr"):
        run(pool, tmp_path, *overrides, "pretrain.warmup_epochs=0")


@pytest.mark.slow
def test_streamed_copies_train_an_encoder_too(ray_cluster, pool, tmp_path):
    run(pool, tmp_path, "pretrain.reading=streamed", "pretrain.image_size=12")
    result = PretrainResult.read(RunDir(tmp_path))
    assert result.reading == "streamed"
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert read_trained_encoder(tmp_path / ENCODER).image_size == 12


@pytest.mark.slow
def test_an_untrained_encoder_and_the_whole_pipeline(ray_cluster, pool, tmp_path):
    run_dir = elfs_ray.run(config_of(pool, tmp_path, "pretrain.epochs=0", "train.epochs=1"))
    assert PretrainResult.read(run_dir).history == []
    assert (tmp_path / "report.html").exists() and (tmp_path / "coreset.txt").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("reading", ["memory", "streamed"])
def test_a_gpu_trains_an_encoder_and_embeds_with_it(pool, tmp_path, reading):
    """The job runs as users run it, on a Ray of its own that has the GPU; the profile is that of GPUs."""
    settings = [setting for setting in SETTINGS if "profile" not in setting and "address" not in setting]
    overrides = [f"pool.uri={pool}", f"run_dir={tmp_path}", "ray_address=local", "until=embed", *settings]
    devices = ["pretrain.device=cuda", "embed.device=cuda", "embed.image_size=null", f"pretrain.reading={reading}"]
    subprocess.run([sys.executable, str(JOB), *overrides, *devices], check=True, timeout=280)
    history = PretrainResult.read(RunDir(tmp_path)).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert read_trained_encoder(tmp_path / ENCODER).network == "resnet18"
    assert vectors(tmp_path).shape == (NUM_DIGITS, 512)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_notice_within_an_epoch_costs_no_step_and_gives_the_same_encoder(tmp_path):
    """On a cluster of its own, in a process of its own: a node is drained, and killed when its time is up."""
    counts = run_script(Path(__file__).with_name("spot_train.py"), "pretrain", "noticed", tmp_path)
    assert (counts["steps"], counts["repeated_steps"]) == (45, 0)
    weights, expected = (read_trained_encoder(tmp_path / run / "run" / ENCODER) for run in ("spot", "undisturbed"))
    assert all(torch.equal(weights.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    spread, undisturbed = (
        [json.loads(path.read_text())["spread"] for path in sorted((tmp_path / run / "run").glob("pretrain/history/*"))]
        for run in ("spot", "undisturbed")
    )
    assert spread == pytest.approx(undisturbed)
