"""The time and memory that --dry-run states, and the warning of a run of days."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from elfs_ray.pipeline import estimates
from elfs_ray.pipeline.dry_run import describe_time, look
from elfs_ray.pipeline.estimates import DAY_S, RAY_START_S, WORKERS_START_S, may_take_days, warn_of_days
from elfs_ray.pipeline.plan import PoolCount
from elfs_ray.runtime.cluster import Devices
from elfs_ray.stages.estimate import Estimate, Work, in_worker, rate_of
from elfs_ray.stages.neighbors.estimate import estimate
from elfs_ray.storage.run_dir import RunDir
from tests.in_process import without_ray
from tests.small_run import config_of
from tests.tables import digit_images, png

PHOTOGRAPHS = ("embed.proxy_image_size=256", "train.image_size=224", "train.epochs=60")
TWO_CPUS = Devices(2, 0, "here", 2)


@pytest.fixture
def pool(tmp_path) -> Path:
    (tmp_path / "pool").mkdir()
    for number, image in enumerate(digit_images(30)[0]):
        (tmp_path / "pool" / f"{number}.png").write_bytes(png(image))
    return tmp_path / "pool"


@pytest.mark.slow
def test_the_time_of_every_long_stage_is_stated(pool, tmp_path):
    """A linear proxy on pixels: so the only thing that takes seconds to measure is the encoder."""
    config = config_of(pool, tmp_path / "run", "train.network=linear", "embed.image_size=32", "train.epochs=9")
    known = look(config)
    assert describe_time(known) == "\ntime      minutes at most for 30 images"
    lines = describe_time(replace(known, pool=PoolCount(100_000))).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["embed", "cluster", "train", "select", "time"]
    assert "measured here: " in lines[0] and " GiB a worker" in lines[0]
    assert all("at stated rates" in line for line in lines[1:-1])
    shutil.rmtree(pool)
    lines = describe_time(replace(known, pool=PoolCount(100_000))).splitlines()
    assert lines[1].startswith("embed     time not estimated: ") and "does not exist" in lines[1]
    assert lines[-1].endswith("of workers, besides embed")


@pytest.mark.slow
def test_the_copies_that_an_encoder_is_trained_on_are_measured(pool, tmp_path):
    (pool / "broken.png").write_bytes(b"no image")
    config = config_of(pool, tmp_path / "run", "embed.encoder=self_supervised", "embed.image_size=null", "until=copy")
    copy, total = describe_time(replace(look(config), pool=PoolCount(50_000))).splitlines()[1:]
    assert copy.startswith("copy      about ") and " GiB a worker; measured here: " in copy
    assert "in all" in total and "not estimated" not in total


def test_the_search_of_a_large_pool_is_not_estimated_as_an_exact_one(pool, tmp_path):
    def seconds(num_samples: int, *keys: str) -> float:
        config = config_of(pool, tmp_path / "run", "duplicates.threshold=0.93", *keys)
        return estimate(Work(config, RunDir(tmp_path / "run"), num_samples, TWO_CPUS, dim=384)).seconds

    assert seconds(200_000) / seconds(100_000) == pytest.approx(4)
    assert seconds(20_000_000) / seconds(10_000_000) == pytest.approx(2, rel=0.02)
    with pytest.raises(ValueError, match="measured when it is built"):
        seconds(1_000_000, "cluster.num_neighbors=50")


def test_a_run_of_days_is_worth_a_warning(pool, tmp_path):
    config = config_of(pool, tmp_path / "run", "train.network=resnet34", *PHOTOGRAPHS)
    plan = look(config).plan
    assert not may_take_days(config, plan, 500, TWO_CPUS)
    assert may_take_days(config, plan, 1_500, TWO_CPUS)
    assert not may_take_days(config, plan, 1_500, replace(TWO_CPUS, num_gpus=1))
    assert not may_take_days(config, [replace(planned, action="done") for planned in plan], 1_500, TWO_CPUS)
    assert warn_of_days(DAY_S) == []
    assert warn_of_days(2.5 * DAY_S)[0].startswith("warning: this run would take about 2.5 days on the devices")


def test_the_seconds_of_all_stages_add_up(pool, tmp_path, monkeypatch):
    config = config_of(pool, tmp_path / "run")
    plan = look(config).plan

    def estimate(stage, work):
        return Estimate(10.0, 2**30, "measured", dim=7) if stage.is_estimated else None

    monkeypatch.setattr(type(plan[0].stage), "estimate", estimate)
    lines, total_s = estimates.estimate_stages(config, RunDir(tmp_path / "run"), plan, 100, TWO_CPUS)
    assert total_s == RAY_START_S + (10 + WORKERS_START_S) * len(lines) and set(lines.values()) == {
        "about 10.0 s, 1.0 GiB a worker; measured"
    }
    done = [replace(planned, action="done") for planned in plan]
    with without_ray(monkeypatch, tmp_path):
        assert estimates.estimate_stages(config, RunDir(tmp_path / "run"), done, 100, TWO_CPUS) == ({}, 0.0)


def test_a_rate_is_that_of_its_calls():
    numbers = []

    def work(number: int) -> None:
        numbers.append(number)
        time.sleep(0.02 * number)

    # A busy machine sleeps longer, but never less.
    assert 0 < rate_of(work, 100) <= 50
    assert numbers[:2] == [2, 2] and max(numbers) > 2
    assert 0 < rate_of(lambda number: time.sleep(0.5 * number), 100) <= 2


def test_what_fails_in_a_worker_is_told_in_a_line():
    with pytest.raises(RuntimeError, match=r"^ValueError: invalid literal for int"):
        in_worker(int, "x")
