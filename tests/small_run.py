"""A small run of the whole pipeline on real digits, which several files of tests read or copy."""

from dataclasses import dataclass
from pathlib import Path

from elfs_ray.config import Config, load_config
from elfs_ray.pipeline.runner import run
from elfs_ray.presets import preset
from tests.tables import digit_images, png

YAML = preset("cifar10")


@dataclass(frozen=True)
class SmallRun:
    """A pool, and the run directory of a complete run of it. Tests must change neither."""

    pool: Path
    run_dir: Path


def overrides(pool: Path | str, run_dir: Path | str, *more: str) -> list[str]:
    """Return the overrides of cifar10.yaml for a small run."""
    return [
        *(f"pool.uri={pool}", f"run_dir={run_dir}", "budget=0.25"),
        *("embed.encoder=pixels", "embed.image_size=8", "embed.proxy_image_size=8", "embed.block_images=64"),
        *("embed.num_workers=1", "cluster.method=kmeans", "cluster.num_clusters=10", "cluster.num_workers=2"),
        *("train.network=small_cnn", "train.epochs=3", "train.batch_size=32", "train.num_workers=2"),
        *("train.cpus_per_worker=1", "train.augmentation=crop", "train.crop_padding=1"),
        *("select.method=double_end", "select.hard_fraction=0.2"),
        *more,
    ]


def config_of(pool: Path | str, run_dir: Path | str, *more: str) -> Config:
    return load_config(YAML, overrides(pool, run_dir, *more))


def make_small_run(folder: Path) -> SmallRun:
    """Run the pipeline in `folder` on 200 images of real digits, one empty file and one text file."""
    small_run = SmallRun(folder / "pool", folder / "run")
    images, labels = digit_images(200)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (small_run.pool / str(label)).mkdir(parents=True, exist_ok=True)
        (small_run.pool / str(label) / f"{number:03d}.png").write_bytes(png(image))
    (small_run.pool / "3" / "empty.png").write_bytes(b"")
    (small_run.pool / "7" / "text.jpg").write_text("not an image")
    run(config_of(small_run.pool, small_run.run_dir))
    return small_run
