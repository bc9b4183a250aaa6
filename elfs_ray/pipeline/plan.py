"""What a run would do with each stage, and every check that can be made before it does."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from elfs_ray.config import LINEAR, SELF_SUPERVISED, Config, ConfigError, check_against_pool, check_balance
from elfs_ray.pipeline.stages import PRETRAINING_STAGES, STAGES, Stage, stages_of
from elfs_ray.pool.listing import PoolColumns, count_unit, find_units
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import BadMarkerError, Marker, RunDir

MIN_UNITS_COUNTED = 64
LARGEST_BLOW_UP = 2  # of the images that an encoder was trained on
UNIT_NOUNS = {"folder": "folder", "parquet": "Parquet file", "webdataset": "tar"}


@dataclass(frozen=True)
class PoolCount:
    """The samples of a pool; `basis` says what they were estimated from, and is empty where they were counted."""

    num_samples: int
    basis: str = ""

    @property
    def is_exact(self) -> bool:
        return not self.basis


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


def check(config: Config, run_dir: RunDir, pool: PoolCount | None = None) -> list[PlannedStage]:
    """Check all that can be known before work starts; the plan. Raises ConfigError.

    pool: its size, where it is not there yet to be counted.
    """
    try:
        _check_places(config, run_dir)
        plan = make_plan(config, run_dir)
        refuse_differences(plan, config, run_dir)
        actions = {planned.stage.name: planned.action for planned in plan}
        if config.pretrains and config.pretrain.network is not None:
            check_network("pretrain.network", config.pretrain.network)
        if not config.pretrains and actions.get("embed", "done") != "done":
            _check_encoder(config)
        check_network("train.network", config.train.network, LINEAR)
        if config.cluster.method == "file" and not filesystem.exists(str(config.cluster.labels_uri)):
            raise ConfigError(f"cluster.labels_uri={config.cluster.labels_uri!r} does not exist")
        check_size(config, run_dir, plan, pool)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return plan


def _check_places(config: Config, run_dir: RunDir) -> None:
    if filesystem.exists(run_dir.uri) and not filesystem.is_dir(run_dir.uri):
        raise ConfigError(f"run_dir={config.run_dir} is a file: give a folder, which need not exist yet")
    pool = filesystem.absolute(config.pool.uri)
    if f"{run_dir.uri}/".startswith(f"{pool}/"):
        raise ConfigError(
            f"run_dir={config.run_dir} is in the pool, pool.uri={config.pool.uri}: its tables would be listed as "
            "images the next time. Give a folder that is elsewhere"
        )


def check_network(key: str, network: str, *others: str) -> None:
    """Raise ConfigError for a network that is neither one on images nor among `others`."""
    from elfs_ray.methods.training.networks import PROXY_MODELS

    known = (*PROXY_MODELS, *others)
    if network not in known:
        raise ConfigError(f"{key}={network!r}: needed is one of {', '.join(known)}")


def _check_encoder(config: Config) -> None:
    """Look at the encoder and its weights, which are fetched for that where they are in a bucket."""
    from elfs_ray.methods.encoders.encoder import check_encoder, encoder_input

    embed = config.embed
    file = embed.weights_file
    with filesystem.local_file(file) if file is not None else nullcontext(embed.weights) as weights:
        try:
            check_encoder(embed.encoder, weights, embed.weights_sha256)
        except ValueError as error:
            given = f"embed.encoder={embed.encoder}" + (f", embed.weights={embed.weights}" if embed.weights else "")
            raise ConfigError(f"{given}: {error}") from error
        if embed.encoder == SELF_SUPERVISED and embed.image_size is not None:
            own = encoder_input(embed.encoder, weights=weights).crop
            if embed.image_size > LARGEST_BLOW_UP * own:
                raise ConfigError(
                    f"embed.image_size={embed.image_size}: the encoder of embed.weights was trained on images of {own} "
                    f"pixels, and features of such large ones are poor; give embed.image_size=null for its own size, "
                    f"or one up to {LARGEST_BLOW_UP * own}"
                )


def make_plan(config: Config, run_dir: RunDir) -> list[PlannedStage]:
    """Return what a run would do with each stage up to config.until. Raises ConfigError for a damaged marker."""
    plan: list[PlannedStage] = []
    identities: dict[str, str] = {}
    for stage in stages_of(config)[: config.stage_names.index(config.until) + 1]:
        planned = plan_stage(stage, config, run_dir, identities)
        identities[stage.name] = planned.marker.identity
        plan.append(planned)
    return plan


def plan_stage(stage: Stage, config: Config, run_dir: RunDir, identities: Mapping[str, str]) -> PlannedStage:
    """What a run would do with one stage, given the identities of those before it."""
    wanted = Marker(stage.name, stage.deciding_config(config), {name: identities[name] for name in stage.inputs}, {})
    try:
        success, started = run_dir.success_marker(stage.name), run_dir.started_marker(stage.name)
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error
    found = success or started
    other = other_writer(stage, run_dir)
    written = () if other is None else (f"{schema.PROXY_IMAGES}/ was written by stage {other.name}",)
    left = tuple(
        f"{name}/ is there, no marker says how it was made" for name in _left_over(found, wanted, stage, run_dir)
    )
    if found is None:
        return PlannedStage(stage, "rerun" if left or written else "run", wanted, written or left)
    if found.identity != wanted.identity or written:
        differences = () if found.identity == wanted.identity else _differences(found, wanted)
        return PlannedStage(stage, "rerun", wanted, differences + written + left)
    damage = run_dir.damage(stage.name)
    return PlannedStage(stage, "mend" if damage else "done" if success else "continue", wanted, damage)


def _left_over(found: Marker | None, wanted: Marker, stage: Stage, run_dir: RunDir) -> list[str]:
    """The folders of a stage that hold files and are not those of the marker that was found."""
    folders = dict.fromkeys((*stage.all_tables(wanted.config), stage.name))
    known = (*stage.all_tables(found.config), stage.name) if found else ()
    others = [name for name in folders if name not in known]
    return [name for name in others if filesystem.list_files(run_dir.path(name), recursive=True)]


def other_writer(stage: Stage, run_dir: RunDir) -> Stage | None:
    """The stage that wrote proxy_images/ in place of the one that is to: embed or copy, as the encoder was another."""
    if schema.PROXY_IMAGES not in stage.tables:
        return None
    other = STAGES[1] if stage.name == "copy" else PRETRAINING_STAGES[0]
    found = run_dir.success_marker(other.name) or run_dir.started_marker(other.name)
    return None if found is None or "copy" in found.inputs else other


def check_size(config: Config, run_dir: RunDir, plan: list[PlannedStage], pool: PoolCount | None = None) -> None:
    """The checks against the size of the pool, where it is known; stage index makes them otherwise."""
    counted = [stage for stage in ("copy", "embed", "cluster") if is_done(stage, plan)]
    for stage in counted:
        check_counted(config, run_dir, stage)
    if counted:
        return
    pool = pool or count_pool(config, run_dir, plan)
    if pool.is_exact:
        check_against_pool(config, pool.num_samples)


def check_counted(config: Config, run_dir: RunDir, stage: str) -> None:
    """The checks against what a complete stage has counted: images that are of use, clusters. Raises ConfigError."""
    figures = run_dir.figures(stage)
    if stage in ("copy", "embed"):
        check_against_pool(config, int(figures["rows"]), int(figures.get("rejected", 0)))
    if stage == "cluster":
        check_balance(config, int(figures["num_clusters"]))


def is_done(stage: str, plan: list[PlannedStage]) -> bool:
    """Whether a stage is complete, with the very config of the plan."""
    return any(planned.stage.name == stage and planned.action == "done" for planned in plan)


def count_pool(config: Config, run_dir: RunDir, plan: list[PlannedStage]) -> PoolCount:
    """The samples in the pool: from index/ where it is complete, else from the listing.

    Of 128 tars or folders and more, 64 or more are counted and the others taken to hold as many.
    Memory: of tars and of folders in a bucket the listings of 16 at a time (see pool/listing.py), of others nothing.
    """
    if is_done("index", plan):
        return PoolCount(int(run_dir.figures("index")["rows"]))
    units = find_units(config.pool.uri, config.pool.format)
    columns = PoolColumns(config.pool.image_column, config.pool.label)
    kind = units[0].format
    step = 1 if kind == "parquet" else max(1, len(units) // MIN_UNITS_COUNTED)
    counted = units[::step]
    with ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(lambda unit: count_unit(unit, columns), counted))
    if step == 1:
        return PoolCount(total)
    basis = f"{len(counted):,} of its {len(units):,} {UNIT_NOUNS[kind]}s"
    return PoolCount(round(total * len(units) / len(counted)), basis)


def _differences(found: Marker, wanted: Marker) -> tuple[str, ...]:
    """What makes two markers of one stage differ, at least one line, by the JSON that their identity is a hash of."""
    keys = sorted(set(found.config) | set(wanted.config))
    values = [
        (
            key,
            *(json.dumps(own.config[key], sort_keys=True) if key in own.config else "none" for own in (found, wanted)),
        )
        for key in keys
    ]
    lines = [f"{key}: {there} there, {now} now" for key, there, now in values if there != now]
    inputs = dict.fromkeys((*wanted.inputs, *found.inputs))
    changed = [name for name in inputs if found.inputs.get(name) != wanted.inputs.get(name)]
    return tuple(lines) or (f"made from another {', '.join(changed)}",)


def refuse_differences(plan: list[PlannedStage], config: Config, run_dir: RunDir) -> None:
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
