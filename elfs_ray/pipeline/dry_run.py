"""The plan of a run, for --dry-run: what each stage would do, with counts and what it asks of the cluster."""

import math

from elfs_ray.config import LINEAR, USES_HARD_FRACTION, Config
from elfs_ray.pipeline.plan import PlannedStage, PoolCount, check, count_pool, is_done
from elfs_ray.pipeline.resources import advice_on, check_request, describe_shortage, requests_of
from elfs_ray.runtime.cluster import Devices, find_devices
from elfs_ray.runtime.progress import count
from elfs_ray.storage import schema
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
    work = _describe_work(config, pool.num_samples)
    for planned in plan:
        name = planned.stage.name
        lines.append(f"{name:<9} {planned.action:<9} {work[name]}; {_describe_requests(name, config, devices)}")
        lines.extend(f"{'':<20}{line}" for line in planned.differences)
        if planned.action != "done":
            lines.extend(f"{'':<20}{line}" for line in advice_on(name, config, devices))
    return "\n".join(lines)


def _describe_budgets_of(pool: PoolCount, config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> list[str]:
    """`describe_budgets` of the images that can be selected, as far as their number is known."""
    if is_done("embed", plan):
        return describe_budgets(config, int(run_dir.figures("embed")["rows"]))
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


def _describe_requests(stage: str, config: Config, devices: Devices) -> str:
    """What a stage asks for, and waits for. Raises ConfigError for what the cluster cannot have."""
    if stage == "report":
        return "the driver"
    requests = requests_of(stage, config, devices)
    for request in requests:
        check_request(request, devices)
    asks = ", ".join([*(request.describe() for request in requests), "tasks of 1 CPU"])
    shortages = filter(None, (describe_shortage(request, devices) for request in requests))
    return "; waits for nodes: ".join([asks, *shortages])


def _describe_work(config: Config, num_samples: int) -> dict[str, str]:
    """One line on what each stage does."""
    embed, cluster, train = config.embed, config.cluster, config.train
    clustering = f"{cluster.num_clusters} clusters, {count(cluster.num_tries, 'try', 'tries')} of up to "
    clustering += count(cluster.max_iterations, "iteration")
    if cluster.method == "temi":
        clustering += f", then TEMI, {cluster.temi.profile} profile"
    if cluster.method == "file":
        clustering = f"pseudo-labels from {cluster.labels_uri}"
    proxy = f"{LINEAR}, on the embeddings" if train.network == LINEAR else train.network
    copies = f"copies of {embed.proxy_image_size} pixels"
    return {
        "index": "list the pool",
        "copy": copies,
        "pretrain": _describe_pretraining(config, num_samples) if config.pretrains else "",
        "embed": f"{embed.encoder}, {'of the copies' if config.pretrains else f'proxy {copies}'}",
        "cluster": clustering,
        "train": f"{proxy}, {count(train.epochs, 'epoch')} of "
        f"{count(math.ceil(num_samples / train.batch_size), 'step')}",
        "select": f"{config.select.method} by {config.select.score}"
        f"{', balanced over pseudo-labels' if config.select.balance else ''}",
        "report": f"{schema.REPORT_FILE} and {schema.METRICS_FILE}",
    }


def _describe_pretraining(config: Config, num_samples: int) -> str:
    from elfs_ray.methods.simclr.training import simclr_settings

    chosen = simclr_settings(vars(config.pretrain), config.pretrain.image_size or config.embed.proxy_image_size)
    steps = math.ceil(num_samples / chosen.batch_size)
    return f"SimCLR, {chosen.network}, {count(chosen.epochs, 'epoch')} of {count(steps, 'step')}"
