"""Everything that an evaluation selects and trains on, with each check that can be made before it does."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elfs_ray.config import (
    USES_HARD_FRACTION,
    Config,
    ConfigError,
    EvaluateConfig,
    check_budgets,
    load_config,
    load_keys,
)
from elfs_ray.evaluation.held_out import class_numbers, list_test_images, refuse_shared_images
from elfs_ray.evaluation.keys import RUNS_OWN, EvaluateRunsConfig
from elfs_ray.evaluation.methods import METHODS, Method
from elfs_ray.pipeline.reselect import config_of
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.stages.training import check_network
from elfs_ray.storage.run_dir import RunDir

MIN_SAMPLES = 2  # of a training, whose batch norms need more than one


@dataclass(frozen=True)
class Source:
    """A finished run: its directory, what its markers say of its config, and the name that tells it from the others."""

    run_dir: RunDir
    base: Mapping[str, Any]
    name: str

    @property
    def config(self) -> Config:
        """The config that the run was made with, as far as its markers have it."""
        return load_config(None, [f"run_dir={self.run_dir.uri}"], base=self.base)

    @property
    def num_samples(self) -> int:
        """Samples that can be selected."""
        return TrainResult.read(self.run_dir).rows


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method on a run, with the config of its selection; none for badge and full."""

    name: str
    method_name: str
    source: Source
    config: Config | None

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]


@dataclass(frozen=True)
class Workload:
    """Everything that is to be selected and trained on; images and labels are those of the first source."""

    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    counts: tuple[int, ...]
    columns: PoolColumns
    pool_uri: str
    pool_format: str


def load(overrides: list[str]) -> EvaluateRunsConfig:
    """Return the keys of jobs/evaluate.py, each checked by itself. Raises ConfigError."""
    config = load_keys(EvaluateRunsConfig, overrides=overrides)
    for name in ("runs", "methods", "budgets"):
        refuse_duplicates(name, getattr(config, name))
    check_network("network", config.network)
    return config


def refuse_duplicates(key: str, values: Sequence[Any]) -> None:
    """Raise ConfigError for a list that names something twice."""
    if len({str(value) for value in values}) < len(values):
        raise ConfigError(f"{key}={list(values)} names one twice")


def make_workload(config: EvaluateRunsConfig) -> Workload:
    """Check runs, methods, budgets, labels and test images; return what is to be done. Raises ConfigError."""
    check_neighbor_search(config.device, "device", config.ray_address)
    sources = _sources(config.runs)
    first = sources[0].run_dir
    entries = tuple(entry for method in config.methods for entry in _entries(method, sources, config))
    index = first.complete_marker(IndexResult.stage)
    label = config.pool.label or index.config.get("pool.label")
    if label is None:
        raise ConfigError(f"{first.uri} has no true labels, as its pool.label was null: give pool.label=...")
    counts = _counts(config, sources[0].num_samples)
    columns = PoolColumns(index.config.get("pool.image_column"), label)
    workload = Workload(
        sources, entries, counts, columns, index.config["pool.uri"], index.config.get("pool.format", "auto")
    )
    listed = list_test_images(config.test_uri, workload.pool_format, columns)
    names = tuple(IndexResult.read(first).label_names)
    if names:  # else the run copied no labels, and they are numbered once they are read
        class_numbers(config.test_uri, listed, names)
    refuse_shared_images(config.test_uri, listed, first)
    return workload


def check_neighbor_search(device: str, key: str, ray_address: str | None) -> None:
    """Raise ConfigError where nearest neighbours, by which embeddings are judged, cannot be searched on the device."""
    from elfs_ray.methods.numeric.faiss_build import check_faiss
    from elfs_ray.runtime.cluster import find_devices

    try:
        check_faiss("an evaluation, which searches nearest neighbours,", find_devices(ray_address).resolve(device, key))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _sources(uris: list[str]) -> tuple[Source, ...]:
    """Return the runs, which must be complete, undamaged, and of one pool."""
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
                f"{run_dir.uri} is a run of another pool than {run_dirs[0].uri}: only coresets of one pool can be "
                "compared"
            )
    methods = [ClusterResult.read(run_dir).method for run_dir in run_dirs]
    folders = [run_dir.uri.rstrip("/").rsplit("/", 1)[1] for run_dir in run_dirs]
    names = next((names for names in (methods, folders) if len(set(names)) == len(names)), None)
    if names is None:
        raise ConfigError(f"runs={uris}: two folders have the same name, which must tell them apart: rename one")
    return tuple(map(Source, run_dirs, bases, names))


def _pool_of(run_dir: RunDir) -> tuple[Mapping[str, Any], int]:
    """Return what tells a run's pool from another: its keys, but for the labels, and its number of images."""
    index = run_dir.complete_marker(IndexResult.stage)
    keys = {key: value for key, value in index.config.items() if key != "pool.label"}
    return keys, IndexResult.read(run_dir).rows


def _entries(text: str, sources: tuple[Source, ...], config: EvaluateRunsConfig) -> list[Entry]:
    """Return the lines of one method: on the first run, on a run of each kind of embeddings, or on every run."""
    name, _ = parse_method(text)
    method = METHODS[name]
    chosen = sources
    if method.made_from == "first run":
        chosen = sources[:1]
    elif method.made_from == "embeddings":
        # Of runs that share embeddings the first, in the order of the runs.
        by_embeddings = {source.run_dir.identity("embed"): source for source in reversed(sources)}
        chosen = tuple(by_embeddings.values())[::-1]
    return [
        Entry(
            f"{text}-{source.name}" if len(chosen) > 1 else text,
            name,
            source,
            None if method.select_keys is None else _config_of(text, name, source, config),
        )
        for source in chosen
    ]


def parse_method(text: str) -> tuple[str, list[str]]:
    """Return (name, keys of select) of a text such as elfs+score=el2n. Raises ConfigError for what no method takes."""
    name, *keys = text.split("+")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3)
        raise ConfigError(f"methods: {text!r} must be one of {', '.join(close or METHODS)}")
    if keys and METHODS[name].select_keys is None:
        raise ConfigError(f"methods: {text!r}: {name} is not made by select and takes none of its keys")
    return name, keys


def _config_of(text: str, name: str, source: Source, config: EvaluateRunsConfig) -> Config:
    """Return the config of a selection from a finished run. Raises ConfigError for one that cannot be made."""
    hard_fraction = _hard_fraction(source, config) if name == "elfs" else None
    try:
        selection = selection_config(text, config, source.base, source.run_dir.uri, config.budgets, hard_fraction)
    except ConfigError as error:
        if "cluster.num_neighbors" not in str(error):
            raise
        raise ConfigError(
            f"{error} to {source.run_dir.uri}, run again with on_change=rerun, or leave {text} out of methods"
        ) from error
    try:
        check_budgets(selection, source.num_samples)
    except ConfigError as error:
        raise ConfigError(f"methods: {text}: {error}") from error
    return selection


def selection_config(
    text: str,
    settings: EvaluateConfig,
    base: Mapping[str, Any],
    run_uri: str,
    budgets: Sequence[int | float],
    hard_fraction: Any,
) -> Config:
    """Return the config of a method's selection: that of the run, then the method's keys, then those of the text.

    hard_fraction: that of elfs; other methods have theirs. Raises ConfigError for keys that do not fit each other.
    """
    name, keys = parse_method(text)
    fraction = {"elfs": hard_fraction, "aum_ccs": settings.proxy.ccs_hard_fraction}.get(name, 0)
    overrides = [
        f"run_dir={run_uri}",
        f"budget={budgets[0] if len(budgets) == 1 else list(budgets)}",
        "on_change=refuse",
        f"select.hard_fraction={fraction}",
    ]
    overrides += [*(METHODS[name].select_keys or ()), *(f"select.{key}" for key in keys)]
    try:
        return load_config(None, overrides, base=base)
    except ConfigError as error:
        raise ConfigError(f"methods: {text}: {error}") from error


def _hard_fraction(source: Source, config: EvaluateRunsConfig) -> Any:
    """Return the hard fraction of the config, or the run's: one for all budgets, or that of each."""
    if config.hard_fraction != RUNS_OWN:
        return config.hard_fraction
    fraction, budget = source.base["select"]["hard_fraction"], source.base["budget"]
    if not isinstance(fraction, list):
        return fraction
    of_budget = dict(zip(map(str, budget if isinstance(budget, list) else [budget]), fraction, strict=True))
    missing = [budget for budget in config.budgets if str(budget) not in of_budget]
    if missing:
        raise ConfigError(
            f"{source.run_dir.uri} has a hard fraction for each of its budgets, and none for {missing}: give "
            "hard_fraction=... (a number, auto, search, or one for each budget)"
        )
    return [of_budget[str(budget)] for budget in config.budgets]


def _counts(config: EvaluateRunsConfig, num_samples: int) -> tuple[int, ...]:
    from elfs_ray.methods.selection.pruning import budget_count

    try:
        counts = tuple(budget_count(budget, num_samples) for budget in config.budgets)
    except ValueError as error:
        raise ConfigError(f"budgets={config.budgets}: {error}") from error
    if min(counts) < MIN_SAMPLES:
        raise ConfigError(f"budgets={config.budgets}: a training needs at least {MIN_SAMPLES} samples")
    return counts


def describe(config: EvaluateRunsConfig) -> str:
    """Return what `run` would do, for people. Raises ConfigError as it does."""
    workload = make_workload(config)
    lines = [f"pool      {workload.pool_uri}, {workload.sources[0].num_samples:,} images to choose from"]
    lines += [f"run       {source.name}: {source.run_dir.uri}" for source in workload.sources]
    lines += [
        f"budget    {budget}: {count:,} images" for budget, count in zip(config.budgets, workload.counts, strict=True)
    ]
    for entry in workload.entries:
        select = entry.config.select if entry.config else None
        hard = f", hard fraction {select.hard_fraction}" if select and select.method in USES_HARD_FRACTION else ""
        lines.append(f"method    {entry.name}: {entry.method.meaning}{hard}")
    lines.append(describe_trainings(config, [entry.method_name for entry in workload.entries], len(config.budgets)))
    return "\n".join([*lines[:-1], f"{lines[-1]}, to {config.out}"])


def describe_trainings(settings: EvaluateConfig, methods: Sequence[str], num_budgets: int) -> str:
    """Return how many trainings the methods take, all images being one budget, in one line."""
    num_selections = sum(1 if method == "full" else num_budgets for method in methods)
    return (
        f"evaluate  {num_selections * settings.num_seeds:,} trainings of {settings.network}, "
        f"{settings.iterations:,} steps each"
    )
