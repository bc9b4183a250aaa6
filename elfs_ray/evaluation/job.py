"""Run the pipeline, then evaluate its coresets if evaluate.test_uri names test images.

Methods are compared at every budget of the run. Everything is written to evaluate/ in the run directory; run.py lists
the files.
"""

import dataclasses
from dataclasses import asdict
from typing import TYPE_CHECKING

from elfs_ray.config import LINEAR_PROBE, Config, ConfigError
from elfs_ray.evaluation.held_out import list_test_images, refuse_shared_units
from elfs_ray.evaluation.keys import check_image_size, check_neighbor_search, keys_of_job, refuse_duplicates
from elfs_ray.evaluation.workload import (
    MIN_SAMPLES,
    describe_trainings,
    line_name,
    parse_method,
    refuse_same_lines,
    selection_config,
)
from elfs_ray.pipeline import rewrite_report, runner
from elfs_ray.pipeline.dry_run import describe_plan, describe_time, look
from elfs_ray.pipeline.plan import PoolCount
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.runtime.progress import say
from elfs_ray.stages import report, select
from elfs_ray.stages.training import check_network
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from elfs_ray.evaluation.report import Results


def describe(config: Config, pool: PoolCount | None = None) -> str:
    """Describe what `run` would do, with counts, resources and time, after the same checks. Raises ConfigError.

    pool: the size of a pool that the job writes itself, together with the test images, before it runs.
    """
    check(config, images_are_there=pool is None)
    known = look(config, pool)
    lines = [describe_plan(known)]
    if config.evaluate.test_uri is not None:
        methods = [parse_method(text)[0] for text in config.evaluate.methods]
        trainings = describe_trainings(
            config.evaluate, config.ray_address, config.keeps_copies, methods, len(config.budgets)
        )
        lines.append(_why_not(config) or f"{trainings}; on {', '.join(config.evaluate.methods)}")
    lines.append(describe_time(known))
    return "\n".join(lines)


def run(config: Config) -> RunDir:
    """Run the pipeline, then evaluate its coresets if config.evaluate.test_uri is set. Complete work is kept.

    Raises ConfigError, before any work, for a config that cannot be run.
    """
    return run_with_results(config)[0]


def run_with_results(config: Config) -> tuple[RunDir, "Results | None"]:
    """Do what `run` does; also return what the evaluation measured, None if there was no evaluation."""
    check(config)
    run_dir = runner.run(config)
    if config.evaluate.test_uri is None:
        return run_dir, None
    if reason := _why_not(config):
        say(reason)
        return run_dir, None
    # Late, as it imports torch, which a dry run does not need.
    from elfs_ray.evaluation.run import run as evaluate

    results = evaluate(keys_of_job(config), config.train)
    if report.STAGE in stages_of(config):
        rewrite_report.rewrite(config)  # with the accuracies
    return run_dir, results


def _why_not(config: Config) -> str:
    """Return why a run that names test images is not evaluated, or an empty string if it is."""
    return "" if select.STAGE in stages_of(config) else f"evaluate  left out, as until={config.until}"


def check(config: Config, *, images_are_there: bool = True) -> None:
    """Check everything about an evaluation that can be checked before the run exists. Raises ConfigError."""
    evaluate = config.evaluate
    if evaluate.test_uri is None:
        return
    check_network("evaluate.network", evaluate.network, "auto", LINEAR_PROBE)
    check_image_size("evaluate.image_size", evaluate.image_size, config.embed.proxy_image_size)
    check_neighbor_search(evaluate.device, "evaluate.device", config.ray_address)
    try:
        refuse_duplicates("methods", evaluate.methods)
        names = []
        for text in evaluate.methods:
            selection = selection_config(
                text, evaluate, asdict(config), config.run_dir, config.budgets, config.select.hard_fraction
            )
            _check_stages(text, selection, config)
            names.append(line_name(text, selection))
        refuse_same_lines(names)
        if images_are_there:
            columns = PoolColumns(config.pool.image_column, config.pool.label)
            list_test_images(evaluate.test_uri, config.pool.format, columns)
            refuse_shared_units(evaluate.test_uri, config.pool.uri, config.pool.format)
    except ConfigError as error:
        # These messages begin with the key as `elfs-ray evaluate` names it, without the section.
        raise ConfigError(f"evaluate.{error}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if any(isinstance(budget, int) and budget < MIN_SAMPLES for budget in config.budgets):
        raise ConfigError(f"budget={config.budget}: a training of the evaluation needs at least {MIN_SAMPLES} images")


def _check_stages(text: str, selection: Config, config: Config) -> None:
    """Raise ConfigError for a method that reads tables which the run will not have."""
    planned = {stage.name for stage in stages_of(dataclasses.replace(config, until=None))}
    missing = [stage for stage in select.STAGE.inputs(selection) if stage not in planned]
    if missing:
        raise ConfigError(
            f"methods: {text} needs stage {' and stage '.join(missing)}, which a run with select.method="
            f"{config.select.method} does not have: leave it out, or evaluate a run that selects by training dynamics"
        )
