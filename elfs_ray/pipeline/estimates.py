"""Estimate the time and memory of a run's stages, for --dry-run, and warn of a run that would take more than a day."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elfs_ray.config import LINEAR, Config
from elfs_ray.pipeline.connection import needs_ray
from elfs_ray.pipeline.plan import PlannedStage
from elfs_ray.runtime.progress import count, format_duration
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:  # importing them imports torch and Ray
    from elfs_ray.runtime.cluster import Devices
    from elfs_ray.stages.estimate import Work

DAY_S = 86_400
RAY_START_S, WORKERS_START_S = 15.0, 14.0  # of Ray, and of the workers of a stage
FEW = 1_000  # images of 224 pixels, which take minutes with any encoder
ENCODER_SIDE = 224  # pixels, of most encoders
SHORT_CPU, SHORT_GPU = 20_000, 2_000_000  # images of 224 pixels of which a core, a GPU surely sees more in a day


def estimate_stages(
    config: Config, run_dir: RunDir, plan: Sequence[PlannedStage], num_samples: int, devices: "Devices"
) -> tuple[dict[str, str], float]:
    """Return a line for each stage that is to run and takes more than seconds, and the seconds of the run.

    These include the start of Ray and of the workers of each stage, in a run that needs them.
    """
    from elfs_ray.stages.estimate import Work

    embedded = run_dir.success_marker(EmbedResult.stage)
    dim = EmbedResult.from_json(embedded.result).dim if embedded else 0
    work = Work(config, run_dir, num_samples, devices, dim)
    lines: dict[str, str] = {}
    starts_ray = needs_ray(config, [planned.stage for planned in plan if planned.action != "done"], num_samples)
    total_s = RAY_START_S if starts_ray else 0.0
    for planned in plan:
        if planned.action == "done":
            continue
        line, seconds, dim = _estimate(planned.stage, work)
        total_s += seconds + (WORKERS_START_S if starts_ray and line else 0)
        work = dataclasses.replace(work, dim=dim or work.dim)
        lines |= {planned.stage.name: line} if line else {}
    return lines, total_s


def _estimate(stage: Stage, work: "Work") -> tuple[str, float, int]:
    """Return the line of a stage, its seconds, and the dimension of embeddings if it has measured that."""
    try:
        estimate = stage.estimate(work)
    # A plan is worth having without its hours, and images, networks and GPUs fail in many ways.
    except Exception as error:
        return f"time not estimated: {error}", 0.0, 0
    return (estimate.describe(), estimate.seconds, estimate.dim) if estimate else ("", 0.0, 0)


def describe_estimates(
    config: Config, run_dir: RunDir, plan: Sequence[PlannedStage], num_samples: int, devices: "Devices"
) -> list[str]:
    """Return the lines of `estimate_stages`, one about the whole run, and a warning for one of more than a day."""
    if _passes(config) * num_samples <= FEW:
        return [f"\ntime      minutes at most for {count(num_samples, 'image')}"]
    lines, total_s = estimate_stages(config, run_dir, plan, num_samples, devices)
    unknown = [name for name, line in lines.items() if line.startswith("time not")]
    besides = f", besides {' and '.join(unknown)}" if unknown else ""
    return [
        "",
        *(f"{name:<9} {line}" for name, line in lines.items()),
        f"time      about {format_duration(total_s)} in all{besides}",
        *warn_of_days(total_s),
    ]


def warn_of_days(total_s: float) -> list[str]:
    """Return a warning for a run of more than a day."""
    if total_s <= DAY_S:
        return []
    return [
        f"warning: this run would take about {total_s / DAY_S:.1f} days on the devices that are there: use GPUs or a "
        "larger cluster (ray_address), a smaller encoder or network, or the preset photos, which trains nothing"
    ]


def may_take_days(config: Config, plan: Sequence[PlannedStage], num_samples: int, devices: "Devices") -> bool:
    """Return whether a run is worth an estimate before it starts, which takes some ten seconds itself."""
    if all(planned.action == "done" for planned in plan):
        return False
    return _passes(config) * num_samples > max(SHORT_CPU * devices.num_cpus, SHORT_GPU * devices.num_gpus)


def _passes(config: Config) -> float:
    """Return how often all images pass through a network, in passes of 224 pixels."""
    passes = ((config.embed.image_size or ENCODER_SIDE) / ENCODER_SIDE) ** 2
    train, copies = config.train, config.embed.proxy_image_size
    if config.needs_dynamics and train.network != LINEAR:
        passes += train.epochs * ((train.image_size or copies) / ENCODER_SIDE) ** 2
    if config.pretrains:
        epochs = config.pretrain.epochs or 400
        passes += epochs * ((config.pretrain.image_size or copies) / ENCODER_SIDE) ** 2
    return passes
