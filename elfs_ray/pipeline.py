"""The order of the stages: skip what is complete, refuse what was made with another config, time each.

    index ──► embed ──► cluster ──► train ──► select ──► report
    index ──► copy ──► pretrain ──► embed ──► ...               with an encoder that is trained on the pool itself

No science here: a stage is a function of (config, run_dir) that reads tables and writes its own.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

from elfs_ray.config import STAGE_NAMES, Config, ConfigError, check_against_pool, deciding_keys
from elfs_ray.progress import format_duration, listen, say
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.pool import PoolColumns, count_unit, find_units
from elfs_ray.storage.run_dir import Marker, RunDir

MAX_UNITS_COUNTED = 64
RECORDED_VERSIONS = ("elfs-ray", "ray", "torch", "torchvision", "pyarrow", "numpy", "pillow")


@dataclass(frozen=True)
class Stage:
    """One stage: what decides its result, what it reads, what it writes.

    Its function is `elfs_ray.stages.<name>.run_<name>`; it is imported when it runs, so that --help and --dry-run are
    quick and a worker imports only its own stage.
    """

    name: str
    section: str
    inputs: tuple[str, ...]
    tables: tuple[str, ...]
    global_keys: tuple[str, ...] = ("seed",)
    section_keys: tuple[str, ...] | None = None  # where the others of the section are for another stage

    def deciding_config(self, config: Config) -> dict[str, Any]:
        found = deciding_keys(getattr(config, self.section))
        keys = {f"{self.section}.{key}": found[key] for key in self.section_keys or found}
        return {**{key: getattr(config, key) for key in self.global_keys}, **keys}

    def function(self) -> Callable[[Config, RunDir], Mapping[str, Any]]:
        module = __import__(f"elfs_ray.stages.{self.name}", fromlist=[self.name])
        return getattr(module, f"run_{self.name}")


STAGES = (
    Stage("index", "pool", (), (schema.INDEX,), global_keys=()),
    Stage("embed", "embed", ("index",), (schema.EMBEDDINGS, schema.PROXY_IMAGES, schema.REJECTED), global_keys=()),
    Stage("cluster", "cluster", ("embed",), (schema.CLUSTERS, schema.NEIGHBORS)),
    Stage("train", "train", ("embed", "cluster"), (schema.DYNAMICS,)),
    Stage("select", "select", ("index", "cluster", "train"), (schema.SCORES, schema.CORESET), ("seed", "budget")),
    Stage("report", "report", ("index", "embed", "cluster", "train", "select"), (), global_keys=()),
)
COPY_KEYS = ("proxy_image_size", "proxy_jpeg_quality", "max_image_pixels", "block_images")
# In place of embed, where the encoder is trained on the pool itself: it needs the copies first.
PRETRAINING_STAGES = (
    Stage("copy", "embed", ("index",), (schema.PROXY_IMAGES,), global_keys=(), section_keys=COPY_KEYS),
    Stage("pretrain", "pretrain", ("index", "copy"), ()),
    Stage("embed", "embed", ("index", "copy", "pretrain"), (schema.EMBEDDINGS, schema.REJECTED), global_keys=()),
)
EVALUATE = Stage("evaluate", "evaluate", ("index", "embed", "train", "select"), ())
assert tuple(stage.name for stage in (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:])) == STAGE_NAMES


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, in their order."""
    return (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:]) if config.pretrains else STAGES


@dataclass(frozen=True)
class PlannedStage:
    """What a run would do with a stage: 'done', 'continue', 'run', or 'rerun' because of `differences`."""

    stage: Stage
    action: str
    marker: Marker
    differences: tuple[str, ...] = ()


def run(config: Config) -> RunDir:
    """Run every stage up to config.until that is not complete.

    Raises ConfigError, before any work, for a config that cannot be run or that differs from the run directory's.
    """
    run_dir = RunDir(config.run_dir)
    plan = check(config, run_dir)
    if all(planned.action == "done" for planned in plan):
        say(f"nothing to do: every stage is complete in {run_dir.uri}")
        return run_dir

    _connect(config)
    _ask(plan, config)
    for planned in plan:
        if planned.action == "done":
            say(f"{planned.stage.name:<9} complete, skipped")
            continue
        _run_stage(planned, config, run_dir)
    return run_dir


def evaluate(config: Config) -> Mapping[str, Any]:
    """Train on the coreset and on random samples with true labels, beside each other; the figures of stage evaluate.

    Runs what is not complete of the pipeline first. Raises ConfigError as `run` does.
    """
    if config.evaluate.test_uri is None or config.pool.label is None:
        raise ConfigError("evaluate needs true labels: give evaluate.test_uri=... and pool.label=...")
    run_dir = run(config)
    planned = _plan_stage(
        EVALUATE, config, run_dir, {stage.name: run_dir.identity(stage.name) for stage in stages_of(config)}
    )
    _refuse_differences([planned], config, run_dir)
    if planned.action != "done":
        _connect(config)
        _run_stage(planned, config, run_dir)
    return run_dir.figures(EVALUATE.name)


def check(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """Check all that can be known before work starts; the plan. Raises ConfigError."""
    from elfs_ray.methods.proxy_models import PROXY_MODELS

    plan = make_plan(config, run_dir)
    _refuse_differences(plan, config, run_dir)
    actions = {planned.stage.name: planned.action for planned in plan}
    try:
        if config.pretrains and config.pretrain.network is not None:
            _check_network("pretrain.network", config.pretrain.network, PROXY_MODELS)
        if not config.pretrains and actions.get("embed", "done") != "done":
            _check_encoder(config)
        _check_network("train.network", config.train.network, PROXY_MODELS)
        check_against_pool(config, count_pool(config, run_dir)[0])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return plan


def _check_network(key: str, network: str, known: Iterable[str]) -> None:
    if network not in known:
        raise ConfigError(f"{key}={network!r}: needed is one of {', '.join(known)}")


def _check_encoder(config: Config) -> None:
    from elfs_ray.methods.encoders import check_encoder

    embed = config.embed
    try:
        check_encoder(embed.encoder, embed.weights, embed.weights_sha256)
    except ValueError as error:
        given = f"embed.encoder={embed.encoder}" + (f", embed.weights={embed.weights}" if embed.weights else "")
        raise ConfigError(f"{given}: {error}") from error


def make_plan(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """What a run would do with each stage up to config.until."""
    plan: list[PlannedStage] = []
    identities: dict[str, str] = {}
    for stage in stages_of(config)[: config.stage_names.index(config.until) + 1]:
        planned = _plan_stage(stage, config, run_dir, identities)
        identities[stage.name] = planned.marker.identity
        plan.append(planned)
    return plan


def _plan_stage(stage: Stage, config: Config, run_dir: RunDir, identities: Mapping[str, str]) -> PlannedStage:
    """What a run would do with one stage, given the identities of those before it."""
    wanted = Marker(stage.name, stage.deciding_config(config), {name: identities[name] for name in stage.inputs}, {})
    success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
    found = success or started
    differences = () if found is None or found.identity == wanted.identity else _differences(found, wanted)
    other = _other_writer(stage, run_dir)
    if other is not None:
        differences += (f"{schema.PROXY_IMAGES}/ was written by stage {other.name}",)
    if differences:
        return PlannedStage(stage, "rerun", wanted, differences)
    return PlannedStage(stage, "run" if found is None else "done" if success else "continue", wanted)


def _other_writer(stage: Stage, run_dir: RunDir) -> Stage | None:
    """The stage that wrote proxy_images/ in place of the one that is to: embed or copy, as the encoder was another."""
    if schema.PROXY_IMAGES not in stage.tables:
        return None
    other = STAGES[1] if stage.name == "copy" else PRETRAINING_STAGES[0]
    found = run_dir.success_marker(other.name) or run_dir.started_marker(other.name)
    return None if found is None or "copy" in found.inputs else other


def count_pool(config: Config, run_dir: RunDir) -> tuple[int, bool]:
    """(samples in the pool, whether that is exact): from index/ where it is complete, else from the listing.

    Of more than 64 tars or folders, 64 are counted and the others taken to hold as many.
    """
    index = run_dir.success_marker("index")
    if index is not None:
        return int(index.figures["rows"]), True
    units = find_units(config.pool.uri, config.pool.format)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    step = 1 if units[0].format == "parquet" else max(1, len(units) // MAX_UNITS_COUNTED)
    counted = units[::step]
    with ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(lambda unit: count_unit(unit, columns), counted))
    return round(total * len(units) / len(counted)), step == 1


def _differences(found: Marker, wanted: Marker) -> tuple[str, ...]:
    keys = sorted(set(found.config) | set(wanted.config))
    lines = [
        f"{key}: {found.config.get(key)!r} there, {wanted.config.get(key)!r} now"
        for key in keys
        if found.config.get(key) != wanted.config.get(key)
    ]
    changed = [name for name, identity in wanted.inputs.items() if found.inputs.get(name) != identity]
    return tuple(lines) or (f"made from another {', '.join(changed)}",)


def _refuse_differences(plan: list[PlannedStage], config: Config, run_dir: RunDir) -> None:
    differing = [planned for planned in plan if planned.action == "rerun"]
    if not differing or config.on_change == "rerun":
        return
    lines = [f"  {planned.stage.name}: {line}" for planned in differing for line in planned.differences]
    names = ", ".join(planned.stage.name for planned in differing)
    raise ConfigError(
        f"{run_dir.uri} was made with another config:\n"
        + "\n".join(lines)
        + f"\nGive another run_dir, the config it was made with, or on_change=rerun to replace {names}."
    )


def _connect(config: Config) -> None:
    from elfs_ray.metrics import report_progress
    from elfs_ray.ray_runtime import connect

    connect(config.ray_address, show_worker_logs=config.ray_logs)
    listen(report_progress)


def _ask(plan: list[PlannedStage], config: Config) -> None:
    """Say what each stage that is to run will ask of the cluster. Raises ConfigError for what it can never have."""
    from elfs_ray.ray_runtime import devices_of_cluster
    from elfs_ray.resources import check_request, requests_of

    devices = devices_of_cluster()
    say(f"devices   {devices.describe()}")
    names = [planned.stage.name for planned in plan if planned.action != "done"]
    requests = {name: requests_of(name, config, devices) for name in names}
    for request in chain.from_iterable(requests.values()):
        check_request(request, devices)
    for name, own in requests.items():
        if own:
            say(f"{name:<9} will ask for {', '.join(request.describe() for request in own)}")


def _run_stage(planned: PlannedStage, config: Config, run_dir: RunDir) -> None:
    stage = planned.stage
    if planned.action == "rerun":
        _remove_tables(stage, run_dir)
    elif planned.action == "continue":
        say(f"{stage.name:<9} started before, goes on")
    # Started before anything is written: what an unfinished stage leaves is never continued with another config.
    run_dir.mark_started(planned.marker)
    start_s = time.time()
    figures = dict(stage.function()(config, run_dir))
    figures["seconds"] = round(time.time() - start_s, 3)
    figures["versions"] = {name: version(name) for name in RECORDED_VERSIONS} | {"python": platform.python_version()}
    marker = planned.marker
    run_dir.mark_complete(Marker(marker.stage, marker.config, marker.inputs, figures))
    say(f"{stage.name:<9} complete in {format_duration(figures['seconds'])}")


def _remove_tables(stage: Stage, run_dir: RunDir) -> None:
    other = _other_writer(stage, run_dir)
    if other is not None:
        _remove_tables(other, run_dir)
    found = run_dir.success_marker(stage.name) or run_dir.started_marker(stage.name)
    if found is None:  # removed with the tables of the other writer
        return
    others = schema.coreset_tables(found.config["budget"])[1:] if stage.name == "select" else []
    tables = (*stage.tables, *others)
    say(f"{stage.name:<9} made with another config: its tables {', '.join(tables) or 'and files'} are replaced")
    # The markers first: tables without markers are never read, markers without tables would be.
    filesystem.delete(run_dir.path(stage.name, schema.SUCCESS_FILE))
    for table in tables:
        filesystem.delete(run_dir.path(table))
        filesystem.delete(run_dir.path(schema.coreset_text_file(table)))
    filesystem.delete(run_dir.path(stage.name))
