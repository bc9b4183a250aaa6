"""The plan of a run, for --dry-run: what each stage would do, with counts and what it asks of the cluster."""

from elfs_ray.config import USES_HARD_FRACTION, Config
from elfs_ray.pipeline.plan import PlannedStage, PoolCount, check, count_pool, is_done
from elfs_ray.runtime.cluster import Devices, find_devices
from elfs_ray.runtime.progress import count
from elfs_ray.runtime.resources import check_request, describe_shortage
from elfs_ray.stages.embed import EmbedResult
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import RunDir


def describe_plan(config: Config, pool: PoolCount | None = None) -> str:
    """What `pipeline.run` would do, with counts and resources, after the same checks. Raises ConfigError.

    pool: the size of a pool that the job itself will write.
    """
    run_dir = RunDir(config.run_dir)
    plan = check(config, run_dir, pool)
    pool = pool or count_pool(config, run_dir, plan)
    devices = find_devices(config.ray_address)
    found = count(pool.num_samples, "image")
    lines = [
        f"pool      {found} in {config.pool.uri}"
        if pool.is_exact
        else f"pool      about {found} in {config.pool.uri}, an estimate from {pool.basis}",
        *(f"budget    {line}" for line in _describe_budgets_of(pool, config, run_dir, plan)),
        f"run_dir   {run_dir.uri}",
        f"devices   {devices.describe()}",
        "",
    ]
    for planned in plan:
        stage = planned.stage
        work = f"{stage.describe(config, pool.num_samples)}; {_describe_requests(stage, config, devices)}"
        lines.append(f"{stage.name:<9} {planned.action:<9} {work}")
        lines.extend(f"{'':<20}{line}" for line in planned.differences)
        if planned.action != "done":
            lines.extend(f"{'':<20}{line}" for line in stage.advice(config, devices))
    return "\n".join(lines)


def _describe_budgets_of(pool: PoolCount, config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> list[str]:
    """`describe_budgets` of the images that can be selected, as far as their number is known."""
    if is_done(EmbedResult, plan):
        return describe_budgets(config, EmbedResult.read(run_dir).rows)
    try:
        return describe_budgets(config, pool.num_samples, "" if pool.is_exact else "about ")
    except ValueError as error:
        assert not pool.is_exact, error
        return [f"{config.budget} does not fit the estimate; stage index counts every image, and checks it then"]


def describe_budgets(config: Config, num_samples: int, about: str = "") -> list[str]:
    """What each coreset holds and what is dropped before it; `about` says that the pool's size is an estimate."""
    from elfs_ray.methods.selection.hard_fraction import fraction_grid
    from elfs_ray.methods.selection.pruning import budget_count, window_start

    lines = []
    for budget, hard_fraction in zip(config.budgets, config.hard_fractions, strict=True):
        kept = budget_count(budget, num_samples)
        line = f"{about}{count(kept, 'image')} ({kept / num_samples:.2%})"
        if hard_fraction == "search":
            trials = len(fraction_grid(config.select.search_step, kept, num_samples))
            steps = count(config.select.search_iterations, "step")
            line += f", after a share of the hardest that {count(trials, 'training')} of {steps} choose"
        elif hard_fraction == "auto":
            line += ", after a share of the hardest that the run's own records choose"
        elif config.select.method in USES_HARD_FRACTION:
            assert not isinstance(hard_fraction, str)
            hard = window_start(num_samples, kept, hard_fraction)
            line += f", after the {about}{hard:,} hardest are dropped"
        lines.append(line)
    return lines


def _describe_requests(stage: Stage, config: Config, devices: Devices) -> str:
    """Return what a stage asks for, and waits for. Raises ConfigError for what the cluster cannot have."""
    if stage.is_on_driver:
        return "the driver"
    requests = stage.requests(config, devices)
    for request in requests:
        check_request(request, devices)
    asks = ", ".join([*(request.describe() for request in requests), "tasks of 1 CPU"])
    shortages = filter(None, (describe_shortage(request, devices) for request in requests))
    return "; waits for nodes: ".join([asks, *shortages])
