"""What an evaluation would select and train, with every check that can be made before it does."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config, ConfigError, check_budgets, deciding_keys, load_config, load_keys
from elfs_ray.evaluation.keys import METHODS, ComparisonConfig
from elfs_ray.pipeline.reselect import config_of
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.stages.training import check_network
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

SUPERVISED = ("aum_ccs", "el2n", "forgetting")  # from a proxy that is trained on true labels
DRAWN = ("random", "dual", "aum_ccs")  # anew for each seed
FROM_EMBEDDINGS = ("prototypicality", "d2", "zcore")
FROM_THE_FIRST_RUN = ("random", "badge", "full", *SUPERVISED)
WITHOUT_KEYS = ("badge", "full")
_UNBALANCED = ("select.balance=false",)
_SELECT_KEYS = {
    "random": ("select.method=random", *_UNBALANCED),
    "prototypicality": ("select.method=prototypicality", *_UNBALANCED),
    "d2": ("select.method=d2", *_UNBALANCED),
    "zcore": ("select.method=zcore", *_UNBALANCED),
    "aum_hardest": ("select.method=hardest", "select.score=aum", *_UNBALANCED),
    "elfs": (),
    "elfs_auto": ("select.hard_fraction=auto",),
    "elfs_search": ("select.hard_fraction=search",),
    "dual": ("select.method=dual_beta", *_UNBALANCED),
    "aum_ccs": ("select.method=stratified", "select.score=aum", *_UNBALANCED),
    "el2n": ("select.method=hardest", "select.score=el2n", *_UNBALANCED),
    "forgetting": ("select.method=hardest", "select.score=forgetting", *_UNBALANCED),
}


@dataclass(frozen=True)
class Source:
    """A finished run: its directory, what its markers say of its config, and the name that tells it from the others."""

    run_dir: RunDir
    base: Mapping[str, Any]
    name: str

    @property
    def num_samples(self) -> int:
        """Samples that can be selected."""
        return TrainResult.read(self.run_dir).rows


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method on a run, with the config of its selection; none for badge and full."""

    name: str
    method: str
    source: Source
    config: Config | None

    @property
    def is_drawn(self) -> bool:
        """Whether each seed has a selection of its own."""
        return self.method in DRAWN


@dataclass(frozen=True)
class Plan:
    """Everything that is to be selected and trained on; images and labels are those of the first source."""

    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    counts: tuple[int, ...]
    columns: PoolColumns
    pool_uri: str
    pool_format: str

    @property
    def num_trials(self) -> int:
        """Trainings a seed."""
        return sum(1 if entry.method == "full" else len(self.counts) for entry in self.entries)


def load(overrides: list[str]) -> ComparisonConfig:
    """The keys of an evaluation. Raises ConfigError."""
    config = load_keys(ComparisonConfig, overrides=overrides)
    for name in ("runs", "methods", "budgets"):
        values = getattr(config, name)
        if len({str(value) for value in values}) < len(values):
            raise ConfigError(f"{name}={values} names one twice")
    check_network("network", config.network)
    return config


def make_plan(config: ComparisonConfig) -> Plan:
    """Check runs, methods, budgets, labels and test images; what is to be done. Raises ConfigError."""
    sources = _sources(config.runs)
    first = sources[0]
    entries = tuple(entry for method in config.methods for entry in _entries(method, sources, config))
    index = first.run_dir.success_marker("index")
    assert index is not None
    label = config.pool.label or index.config.get("pool.label")
    if label is None:
        raise ConfigError(f"{first.run_dir.uri} has no true labels, as its pool.label was null: give pool.label=...")
    plan = Plan(
        sources,
        entries,
        _counts(config, first.num_samples),
        PoolColumns(index.config.get("pool.image_column"), label),
        index.config["pool.uri"],
        index.config.get("pool.format", "auto"),
    )
    _check_test_images(config, plan)
    return plan


def _sources(uris: list[str]) -> tuple[Source, ...]:
    """The runs, which have to be complete, whole, and of one pool."""
    run_dirs = [RunDir(uri) for uri in uris]
    bases = [config_of(run_dir) for run_dir in run_dirs]
    for run_dir in run_dirs:
        damage = [line for stage in ("index", "embed", "cluster", "train", "select") for line in run_dir.damage(stage)]
        if damage:
            raise ConfigError(
                f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
            )
        if _pool_of(run_dir) != _pool_of(run_dirs[0]):
            raise ConfigError(
                f"{run_dir.uri} is a run of another pool than {run_dirs[0].uri}: only coresets of one pool can stand "
                "beside each other"
            )
    methods = [ClusterResult.read(run_dir).method for run_dir in run_dirs]
    folders = [run_dir.uri.rstrip("/").rsplit("/", 1)[1] for run_dir in run_dirs]
    names = next((own for own in (methods, folders) if len(set(own)) == len(own)), None)
    if names is None:
        raise ConfigError(f"runs={uris}: two folders have the same name, which is to tell them apart: rename one")
    return tuple(map(Source, run_dirs, bases, names))


def _pool_of(run_dir: RunDir) -> tuple[Mapping[str, Any], int]:
    """What tells a run's pool from another: its keys, but for the labels, and its number of images."""
    index = run_dir.complete_marker("index")
    keys = {key: value for key, value in index.config.items() if key != "pool.label"}
    return keys, IndexResult.read(run_dir).rows


def _entries(asked: str, sources: tuple[Source, ...], config: ComparisonConfig) -> list[Entry]:
    """The lines of one method: on the first run, on each run of other embeddings, or on each run."""
    method, *given = asked.split("+")
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=3)
        raise ConfigError(f"methods: {asked!r} is none of {', '.join(close or METHODS)}")
    if given and method in WITHOUT_KEYS:
        raise ConfigError(f"methods: {asked!r}: {method} is not made by select and has none of its keys")
    if method in FROM_THE_FIRST_RUN:
        own = sources[:1]
    elif method in FROM_EMBEDDINGS:
        own = tuple({source.run_dir.identity("embed"): source for source in reversed(sources)}.values())[::-1]
    else:
        own = sources
    return [
        Entry(
            f"{asked}-{source.name}" if len(own) > 1 else asked,
            method,
            source,
            None if method in WITHOUT_KEYS else _config_of(asked, method, given, source, config),
        )
        for source in own
    ]


def _config_of(asked: str, method: str, given: list[str], source: Source, config: ComparisonConfig) -> Config:
    """The config of a selection: what the run had, the method's keys, and those given behind it."""
    overrides = [f"run_dir={source.run_dir.uri}", f"budget={config.budgets}", "on_change=refuse"]
    if method.startswith("elfs"):
        overrides.append(f"select.hard_fraction={_hard_fraction(source, config)}")
    elif method == "aum_ccs":
        overrides.append(f"select.hard_fraction={config.proxy.ccs_hard_fraction}")
    else:
        overrides.append("select.hard_fraction=0")
    overrides += [*_SELECT_KEYS[method], *(f"select.{key}" for key in given)]
    try:
        selection = load_config(None, overrides, base=source.base)
        check_budgets(selection, source.num_samples)
    except ConfigError as error:
        neighbors = ""
        if "cluster.num_neighbors" in str(error):
            neighbors = f" to {source.run_dir.uri}, run again with on_change=rerun, or leave {asked} out of methods"
        raise ConfigError(f"methods: {asked}: {error}{neighbors}") from error
    return selection


def _hard_fraction(source: Source, config: ComparisonConfig) -> Any:
    """The hard fraction given, or the run's: one for all budgets, or that of each."""
    if config.hard_fraction != "run":
        return config.hard_fraction
    own, budget = source.base["select"]["hard_fraction"], source.base["budget"]
    if not isinstance(own, list):
        return own
    of_budget = dict(zip(map(str, budget if isinstance(budget, list) else [budget]), own, strict=True))
    missing = [budget for budget in config.budgets if str(budget) not in of_budget]
    if missing:
        raise ConfigError(
            f"{source.run_dir.uri} has a hard fraction for each of its budgets, and none for {missing}: give "
            "hard_fraction=... (a number, auto, search, or one for each budget)"
        )
    return [of_budget[str(budget)] for budget in config.budgets]


def _counts(config: ComparisonConfig, num_samples: int) -> tuple[int, ...]:
    from elfs_ray.methods.selection.pruning import budget_count

    try:
        counts = tuple(budget_count(budget, num_samples) for budget in config.budgets)
    except ValueError as error:
        raise ConfigError(f"budgets={config.budgets}: {error}") from error
    if min(counts) < 2:
        raise ConfigError(f"budgets={config.budgets}: a training needs at least 2 samples")
    return counts


def _check_test_images(config: ComparisonConfig, plan: Plan) -> None:
    """There are test images with labels, and none of them is in the pool."""
    try:
        units = find_units(config.test_uri, plan.pool_format)
        listed = [list_unit(unit, plan.columns) for unit in units]
    except (ValueError, OSError) as error:
        raise ConfigError(f"test_uri: {str(error).replace('pool.uri', 'test_uri')}") from error
    if not sum(rows.num_rows for rows in listed):
        raise ConfigError(f"test_uri={config.test_uri!r} holds no images")
    if any(rows[schema.LABEL].null_count for rows in listed):
        raise ConfigError(f"test_uri={config.test_uri!r} has images without label: check pool.label")
    _check_classes(config, plan, listed)
    tested = np.concatenate([rows[schema.URI].to_numpy() for rows in listed])
    for path in plan.sources[0].run_dir.table_files(schema.INDEX):
        shared = np.intersect1d(tested, filesystem.read_table(path, [schema.URI])[schema.URI].to_numpy())
        if len(shared):
            raise ConfigError(
                f"test_uri={config.test_uri!r} shares {len(shared)} images with the pool, {shared[0]} among them: "
                "images that could be selected cannot test a selection"
            )


def _check_classes(config: ComparisonConfig, plan: Plan, listed: list[pa.Table]) -> None:
    """Classes that are names are the pool's, as far as its run knows them."""
    known = set(IndexResult.read(plan.sources[0].run_dir).label_names)
    named = [rows[schema.LABEL].to_pylist() for rows in listed if pa.types.is_string(rows[schema.LABEL].type)]
    unknown = sorted({name for names in named for name in names} - known)
    if known and unknown:
        raise ConfigError(f"test_uri={config.test_uri!r} has classes that the pool has not: {', '.join(unknown[:5])}")


def describe(config: ComparisonConfig) -> str:
    """What `run` would do. Raises ConfigError as it does."""
    plan = make_plan(config)
    lines = [f"pool      {plan.pool_uri}, {plan.sources[0].num_samples:,} images to choose from"]
    lines += [f"run       {source.name}: {source.run_dir.uri}" for source in plan.sources]
    lines += [
        f"budget    {budget}: {count:,} images" for budget, count in zip(config.budgets, plan.counts, strict=True)
    ]
    for entry in plan.entries:
        keys = deciding_keys(entry.config.select) if entry.config else {}
        hard = f", hard fraction {keys['hard_fraction']}" if entry.method.startswith(("elfs", "aum_ccs")) else ""
        lines.append(f"method    {entry.name}: {METHODS[entry.method]}{hard}")
    trials = plan.num_trials * config.seeds
    lines.append(
        f"evaluate  {trials:,} trainings of {config.network}, {config.iterations:,} steps each, to {config.out}"
    )
    return "\n".join(lines)
