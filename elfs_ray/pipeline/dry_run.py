"""Describe the plan of a run, for --dry-run: what each stage would do, with counts and resources."""

from dataclasses import dataclass

from elfs_ray.config import USES_HARD_FRACTION, Config
from elfs_ray.pipeline.estimates import describe_estimates
from elfs_ray.pipeline.plan import PlannedStage, PoolCount, check, count_pool, is_done
from elfs_ray.pipeline.settle import settle, settle_runtime
from elfs_ray.pool.files import describe_passed_over
from elfs_ray.runtime.cluster import Devices, find_devices
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import check_request, describe_shortage
from elfs_ray.stages.embed import EmbedResult, num_selectable
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class Look:
    """What is known about a run before it starts; decisions: lines about what `auto` stands for."""

    config: Config
    run_dir: RunDir
    plan: list[PlannedStage]
    pool: PoolCount
    devices: Devices
    decisions: list[str]


def look(config: Config, pool: PoolCount | None = None) -> Look:
    """Return what is known about a run, after the same checks as a run.

    pool: the size of the pool, where the job itself will write it and it cannot be counted yet.

    Raises ConfigError.
    """
    run_dir = RunDir(config.run_dir)
    config, decisions = settle(config, run_dir)
    plan = check(config, run_dir, pool)
    pool = pool or count_pool(config, run_dir, plan)
    devices = find_devices(config.ray_address)
    config, more = settle_runtime(config, plan, devices)
    return Look(config, run_dir, plan, pool, devices, decisions + more)


def describe_time(known: Look) -> str:
    """Return the time and memory of the stages that take more than seconds, measured for some ten seconds."""
    arguments = known.config, known.run_dir, known.plan, known.pool.num_samples, known.devices
    return "\n".join(describe_estimates(*arguments))


def describe_plan(known: Look) -> str:
    """Return what a run would do, with counts and resources. Raises ConfigError."""
    config, run_dir, plan, pool, devices = known.config, known.run_dir, known.plan, known.pool, known.devices
    images = count(pool.num_samples, "image")
    where = f"{images} in {', '.join(config.pool.uris)}"
    # A pool that the job itself will write has no format yet.
    told = [f"pool.format={pool.format}"] if pool.format else []
    told += filter(None, [describe_passed_over(pool.remarks.passed_over)])
    told += [f"warning: {warning}" for warning in pool.remarks.shortened_warnings()]
    lines = [
        f"pool      {where}" if pool.is_exact else f"pool      about {where}, an estimate from {pool.basis}",
        *(f"{'':<10}{line}" for line in told),
        *(f"budget    {line}" for line in _describe_budgets_of(pool, config, run_dir, plan)),
        f"run_dir   {run_dir.uri}",
        f"devices   {devices.describe()}",
        *known.decisions,
        "",
    ]
    for planned in plan:
        stage, of_stage = planned.stage, planned.stage.devices(config, devices)
        work, requests = stage.describe(config, pool.num_samples), _describe_requests(stage, config, of_stage)
        lines.append(f"{stage.name:<9} {planned.action:<9} {work}; {requests}")
        lines.extend(f"{'':<20}{line}" for line in planned.differences)
        if planned.action != "done":
            lines.extend(f"{'':<20}{line}" for line in stage.advice(config, of_stage))
    return "\n".join(lines)


def _describe_budgets_of(pool: PoolCount, config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> list[str]:
    """Return `describe_budgets` of the images that can be selected, as far as their number is known."""
    # Budgets are fractions of the embedded images. Before embed is complete, nobody knows how many will be rejected.
    if is_done(EmbedResult, plan):
        return describe_budgets(config, num_selectable(run_dir))
    try:
        return describe_budgets(config, pool.num_samples, "" if pool.is_exact else "about ")
    except ValueError as error:
        # A wrong estimate must not refuse a good budget. An exact count has been checked before.
        assert not pool.is_exact, error
        return [f"{config.budget} does not fit the estimate; stage index counts every image and checks it then"]


def describe_budgets(config: Config, num_samples: int, about: str = "") -> list[str]:
    """Return a line for each coreset: its size, and what is dropped before it.

    about: "about " where the number of samples is an estimate.
    """
    from elfs_ray.methods.selection.hard_fraction import fraction_grid
    from elfs_ray.methods.selection.pruning import budget_count, window_start

    lines = []
    for budget, hard_fraction in zip(config.budgets, config.hard_fractions, strict=True):
        kept = budget_count(budget, num_samples)
        line = f"{about}{count(kept, 'image')} ({kept / num_samples:.2%})"
        if hard_fraction == "search":
            trials = len(fraction_grid(config.select.search_step, kept, num_samples))
            steps = count(config.select.search_iterations, "step")
            line += f", after dropping the hardest (how many: {count(trials, 'training')} of {steps})"
        elif hard_fraction == "auto":
            line += ", after dropping the hardest (how many: estimated from the training dynamics)"
            line += _warn_of_small_clusters(config, kept)
        elif config.select.method in USES_HARD_FRACTION:
            assert not isinstance(hard_fraction, str)
            hard = window_start(num_samples, kept, hard_fraction)
            line += f", after dropping the {about}{hard:,} hardest"
        lines.append(line)
    return lines


def _warn_of_small_clusters(config: Config, kept: int) -> str:
    """Return what select.hard_fraction=auto would say about a budget with too few images for its clusters."""
    from elfs_ray.methods.selection.hard_fraction import MIN_SAMPLES_PER_CLASS

    clusters = config.cluster.num_clusters
    if isinstance(clusters, str) or kept >= MIN_SAMPLES_PER_CLASS * clusters:
        return ""
    return (
        f"; {kept / clusters:.1f} a cluster are too few for auto, which needs about {MIN_SAMPLES_PER_CLASS}: give a "
        "number, or search"
    )


def _describe_requests(stage: Stage, config: Config, devices: Devices) -> str:
    """Return the workers of a stage, and what it must wait for. Raises ConfigError for what the cluster cannot have."""
    if stage.is_on_driver:
        return "the driver"
    requests = stage.requests(config, devices)
    for request in requests:
        check_request(request, devices)
    workers = ", ".join([*(request.describe() for request in requests), "tasks of 1 CPU"])
    shortages = filter(None, (describe_shortage(request, devices) for request in requests))
    return "; waits for nodes: ".join([workers, *shortages])
