"""The order of the stages: skip what is complete, refuse what was made with another config, time each.

    index ──► embed ──► cluster ──► train ──► select ──► report
    index ──► copy ──► pretrain ──► embed ──► ...               with an encoder that is trained on the pool itself

No science here: a stage is a function of (config, run_dir) that reads tables and writes its own.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

from elfs_ray.config import STAGE_NAMES, Config, ConfigError, check_against_pool, deciding_keys
from elfs_ray.progress import count, format_duration, listen, say
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.pool import PoolColumns, count_unit, find_units
from elfs_ray.storage.run_dir import TABLES, BadMarkerError, Marker, RunDir
from elfs_ray.storage.run_lock import RunDirInUse, RunLock

MAX_UNITS_COUNTED = 64
RECORDED_VERSIONS = ("elfs-ray", "ray", "torch", "torchvision", "pyarrow", "numpy", "pillow")


@dataclass(frozen=True)
class Stage:
    """One stage: what decides its result, what it reads, what it writes (tables, and files beside them).

    `mends` says that it makes missing files of its tables again, one by one, when it goes on.

    Its function is `elfs_ray.stages.<name>.run_<name>`; it is imported when it runs, so that --help and --dry-run are
    quick and a worker imports only its own stage.
    """

    name: str
    section: str
    inputs: tuple[str, ...]
    tables: tuple[str, ...]
    global_keys: tuple[str, ...] = ("seed",)
    section_keys: tuple[str, ...] | None = None  # where the others of the section are for another stage
    files: tuple[str, ...] = ()
    mends: bool = False

    def deciding_config(self, config: Config) -> dict[str, Any]:
        found = deciding_keys(getattr(config, self.section))
        keys = {f"{self.section}.{key}": found[key] for key in self.section_keys or found}
        return {**{key: getattr(config, key) for key in self.global_keys}, **keys}

    def all_tables(self, deciding_config: Mapping[str, Any]) -> list[str]:
        """Its tables with the coresets of further budgets."""
        others = schema.coreset_tables(deciding_config["budget"])[1:] if self.name == "select" else []
        return [*self.tables, *others]

    def outputs(self, deciding_config: Mapping[str, Any]) -> list[str]:
        """Every table and file that it leaves."""
        tables = self.all_tables(deciding_config)
        texts = [schema.coreset_text_file(table) for table in tables if table.startswith(schema.CORESET)]
        return [*tables, *texts, *self.files]

    def function(self) -> Callable[[Config, RunDir], Mapping[str, Any]]:
        module = __import__(f"elfs_ray.stages.{self.name}", fromlist=[self.name])
        return getattr(module, f"run_{self.name}")


STAGES = (
    Stage("index", "pool", (), (schema.INDEX,), global_keys=()),
    Stage(
        "embed",
        "embed",
        ("index",),
        (schema.EMBEDDINGS, schema.PROXY_IMAGES, schema.REJECTED),
        global_keys=(),
        mends=True,
    ),
    Stage("cluster", "cluster", ("embed",), (schema.CLUSTERS, schema.NEIGHBORS)),
    Stage("train", "train", ("embed", "cluster"), (schema.DYNAMICS,)),
    Stage("select", "select", ("index", "cluster", "train"), (schema.SCORES, schema.CORESET), ("seed", "budget")),
    Stage(
        "report",
        "report",
        ("index", "embed", "cluster", "train", "select"),
        (),
        global_keys=(),
        files=(schema.REPORT_FILE, schema.METRICS_FILE),
    ),
)
COPY_KEYS = ("proxy_image_size", "proxy_jpeg_quality", "max_image_pixels", "block_images")
# In place of embed, where the encoder is trained on the pool itself: it needs the copies first.
PRETRAINING_STAGES = (
    Stage("copy", "embed", ("index",), (schema.PROXY_IMAGES,), global_keys=(), section_keys=COPY_KEYS, mends=True),
    Stage("pretrain", "pretrain", ("index", "copy"), (), files=(f"pretrain/{schema.ENCODER_FILE}",)),
    Stage(
        "embed",
        "embed",
        ("index", "copy", "pretrain"),
        (schema.EMBEDDINGS, schema.REJECTED),
        global_keys=(),
        mends=True,
    ),
)
EVALUATE = Stage("evaluate", "evaluate", ("index", "embed", "train", "select"), ())
assert tuple(stage.name for stage in (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:])) == STAGE_NAMES


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, in their order."""
    return (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:]) if config.pretrains else STAGES


@dataclass(frozen=True)
class PlannedStage:
    """What a run would do with a stage: 'done', 'continue', 'run', or, because of `differences`, 'rerun' or 'mend'.

    'rerun' replaces what was made with another config, or nobody knows with which; 'mend' what is there in part.
    """

    stage: Stage
    action: str
    marker: Marker
    differences: tuple[str, ...] = ()

    @property
    def needs_consent(self) -> bool:
        return self.action in ("rerun", "mend")


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
    with locked(run_dir) as lock:
        # Once more: until now another driver may have had the run directory.
        plan = make_plan(config, run_dir)
        _refuse_differences(plan, config, run_dir)
        for planned in plan:
            lock.check()
            if planned.action == "done":
                say(f"{planned.stage.name:<9} complete, skipped")
                continue
            _run_stage(planned, config, run_dir)
    return run_dir


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[RunLock]:
    """The run directory for this driver alone, without the half-written files of killed ones. Raises ConfigError."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(RunLock(run_dir.uri, say))
        except RunDirInUse as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(
                f"run_dir={run_dir.uri} cannot be written: {error}. Mend that, or give another run_dir."
            ) from error
        num_deleted = filesystem.delete_half_written(run_dir.uri)
        if num_deleted:
            say(f"{count(num_deleted, 'half-written file')} of a killed run removed")
        yield lock


def evaluate(config: Config) -> Mapping[str, Any]:
    """Train on the coreset and on random samples with true labels, beside each other; the figures of stage evaluate.

    Runs what is not complete of the pipeline first. Raises ConfigError as `run` does.
    """
    if config.evaluate.test_uri is None or config.pool.label is None:
        raise ConfigError("evaluate needs true labels: give evaluate.test_uri=... and pool.label=...")
    _check_network("evaluate.network", config.evaluate.network)
    try:
        find_units(config.evaluate.test_uri, config.pool.format)
    except (ValueError, OSError) as error:
        raise ConfigError(f"evaluate.test_uri: {error}") from error
    run_dir = run(config)
    planned = _plan_stage(
        EVALUATE, config, run_dir, {stage.name: run_dir.identity(stage.name) for stage in stages_of(config)}
    )
    _refuse_differences([planned], config, run_dir)
    if planned.action != "done":
        _connect(config)
        with locked(run_dir):
            _run_stage(planned, config, run_dir)
    return run_dir.figures(EVALUATE.name)


def check(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """Check all that can be known before work starts; the plan. Raises ConfigError."""
    try:
        plan = make_plan(config, run_dir)
        _refuse_differences(plan, config, run_dir)
        actions = {planned.stage.name: planned.action for planned in plan}
        if config.pretrains and config.pretrain.network is not None:
            _check_network("pretrain.network", config.pretrain.network)
        if not config.pretrains and actions.get("embed", "done") != "done":
            _check_encoder(config)
        _check_network("train.network", config.train.network)
        if config.cluster.method == "file" and not filesystem.exists(str(config.cluster.labels_uri)):
            raise ConfigError(f"cluster.labels_uri={config.cluster.labels_uri!r} does not exist")
        check_against_pool(config, count_pool(config, run_dir)[0])
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return plan


def _check_network(key: str, network: str) -> None:
    from elfs_ray.methods.proxy_models import PROXY_MODELS

    if network not in PROXY_MODELS:
        raise ConfigError(f"{key}={network!r}: needed is one of {', '.join(PROXY_MODELS)}")


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
    try:
        success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error
    found = success or started
    other = _other_writer(stage, run_dir)
    written = () if other is None else (f"{schema.PROXY_IMAGES}/ was written by stage {other.name}",)
    if found is None:
        left = tuple(f"{name}/ is there, no marker says how it was made" for name in _left_over(stage, run_dir))
        return PlannedStage(stage, "rerun" if left else "run", wanted, written or left)
    if found.identity != wanted.identity or written:
        differences = () if found.identity == wanted.identity else _differences(found, wanted)
        return PlannedStage(stage, "rerun", wanted, differences + written)
    damage = run_dir.damage(stage.name)
    return PlannedStage(stage, "mend" if damage else "done" if success else "continue", wanted, damage)


def _left_over(stage: Stage, run_dir: RunDir) -> list[str]:
    """The folders of a stage that hold files."""
    folders = dict.fromkeys((*stage.tables, stage.name))
    return [name for name in folders if filesystem.list_files(run_dir.path(name), recursive=True)]


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
    differing = [planned for planned in plan if planned.needs_consent]
    if not differing or config.on_change == "rerun":
        return
    lines = [f"  {planned.stage.name}: {line}" for planned in differing for line in planned.differences]
    names = ", ".join(planned.stage.name for planned in differing)
    if all(planned.action == "mend" for planned in differing):
        what, remedy = "is damaged", "Restore what was lost, or give on_change=rerun to make it again in"
    else:
        what = "was made with another config"
        remedy = "Give another run_dir, the config it was made with, or on_change=rerun to replace"
    raise ConfigError(f"{run_dir.uri} {what}:\n" + "\n".join(lines) + f"\n{remedy} {names}.")


def _connect(config: Config) -> None:
    from elfs_ray.metrics import report_progress
    from elfs_ray.ray_runtime import connect

    try:
        connect(config.ray_address, show_worker_logs=config.ray_logs)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at ray_address={config.ray_address}: {error}") from error
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
    stage, marker = planned.stage, planned.marker
    lost = _lost_tables(planned, run_dir)
    if planned.needs_consent:
        _remove_tables(planned, run_dir)
    elif planned.action == "continue":
        say(f"{stage.name:<9} started before, goes on")
    # Started before anything is written: what an unfinished stage leaves is never continued with another config.
    run_dir.mark_started(Marker(marker.stage, marker.config, marker.inputs, {TABLES: lost} if lost else {}))
    start_s = time.time()
    try:
        figures = dict(stage.function()(config, run_dir))
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"stopped in stage {stage.name}, what it has saved and every stage before it are in {run_dir.uri}"
        )
        raise
    figures["seconds"] = round(time.time() - start_s, 3)
    figures["versions"] = {name: version(name) for name in RECORDED_VERSIONS} | {"python": platform.python_version()}
    figures[TABLES] = run_dir.measure(stage.outputs(marker.config))
    if lost and stage.tables and lost != figures[TABLES]:
        raise RuntimeError(
            f"the tables that stage {stage.name} made again are not those that were lost ({figures[TABLES]}, they were "
            f"{lost}): the pool, the software or the number of training workers is another one, and what follows was "
            "made from those. Give another run_dir."
        )
    run_dir.mark_complete(Marker(marker.stage, marker.config, marker.inputs, figures))
    say(f"{stage.name:<9} complete in {format_duration(figures['seconds'])}")


def _lost_tables(planned: PlannedStage, run_dir: RunDir) -> Mapping[str, Any]:
    """The sizes that the tables of a damaged stage had, which they have to have again: later stages read them."""
    stage = planned.stage.name
    found = run_dir.success_marker(stage) if planned.action == "mend" else None
    if planned.action == "continue":
        found = run_dir.started_marker(stage)
    return found.figures.get(TABLES, {}) if found else {}


def _remove_tables(planned: PlannedStage, run_dir: RunDir) -> None:
    stage = planned.stage
    if planned.action == "mend" and stage.mends:
        say(f"{stage.name:<9} damaged: what is missing of its tables is made again")
        filesystem.delete(run_dir.path(stage.name, schema.SUCCESS_FILE))
        return
    other = _other_writer(stage, run_dir)
    if other is not None:
        _remove_stage(other, run_dir, "made with another config")
    _remove_stage(stage, run_dir, "damaged" if planned.action == "mend" else "made with another config")


def _remove_stage(stage: Stage, run_dir: RunDir, why: str) -> None:
    found = run_dir.success_marker(stage.name) or run_dir.started_marker(stage.name)
    made_with = found.config if found else {"budget": None}
    if not any(filesystem.exists(run_dir.path(name)) for name in (*stage.outputs(made_with), stage.name)):
        return  # removed with the tables of another writer
    say(f"{stage.name:<9} {why}: its tables {', '.join(stage.all_tables(made_with)) or 'and files'} are replaced")
    # The markers first: tables without markers are never read, markers without tables would be.
    filesystem.delete(run_dir.path(stage.name, schema.SUCCESS_FILE))
    for name in (*stage.outputs(made_with), stage.name):
        filesystem.delete(run_dir.path(name))
