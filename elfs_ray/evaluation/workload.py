"""Turn the keys of an evaluation into what it selects and trains on, after every check that needs no work."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elfs_ray.config import (
    LINEAR_PROBE,
    USES_HARD_FRACTION,
    Config,
    ConfigError,
    EvaluateConfig,
    check_budgets,
    load_config,
    load_keys,
    name_in_tables,
)
from elfs_ray.evaluation.held_out import class_numbers, list_test_images, refuse_shared_images
from elfs_ray.evaluation.keys import (
    AS_IN_RUN,
    EvaluateRunsConfig,
    check_image_size,
    check_neighbor_search,
    network_on,
    refuse_duplicates,
)
from elfs_ray.evaluation.methods import METHODS, Method
from elfs_ray.pipeline.reselect import check_stages, config_of
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.pool.listing import PoolColumns
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.embed import num_selectable
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.training import check_network
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MIN_SAMPLES = 2  # per training: batch norm cannot normalise a single sample


@dataclass(frozen=True)
class Source:
    """A finished run.

    base: the part of its config that its markers record, nested. name: what tells it from the other runs.
    """

    run_dir: RunDir
    base: Mapping[str, Any]
    name: str

    @property
    def config(self) -> Config:
        """Return the config that the run was made with, as far as its markers record it."""
        return load_config(None, [f"run_dir={self.run_dir.uri}"], base=self.base)

    @property
    def has_copies(self) -> bool:
        """Return whether the run keeps copies of its images, which networks learn from."""
        return bool(self.run_dir.table_files(schema.PROXY_IMAGES))

    @property
    def has_clusters(self) -> bool:
        """Return whether the run has pseudo-labels."""
        return self.run_dir.success_marker(ClusterResult.stage) is not None

    @property
    def num_samples(self) -> int:
        """Return the number of samples that can be selected."""
        return num_selectable(self.run_dir)


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method applied to a run. config: of its selection; None for badge and full."""

    name: str
    method_name: str
    source: Source
    config: Config | None

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]


@dataclass(frozen=True)
class Workload:
    """Everything to select and to train on. Images and labels come from the first source."""

    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    counts: tuple[int, ...]
    columns: PoolColumns
    pool_uri: str | list[str]
    pool_format: str


def load(overrides: list[str]) -> EvaluateRunsConfig:
    """Return the keys of `elfs-ray evaluate`, each checked on its own. Raises ConfigError."""
    config = load_keys(EvaluateRunsConfig, overrides=overrides)
    for name in ("runs", "methods", "budgets"):
        refuse_duplicates(name, getattr(config, name))
    check_network("network", config.network, "auto", LINEAR_PROBE)
    return config


def refuse_same_lines(names: Sequence[str]) -> None:
    """Raise ConfigError if two methods have the same name in the tables, because one of them is `run`."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(f"methods: run selects by {twice[0]}, which has a line already: leave run or {twice[0]} out")


def make_workload(config: EvaluateRunsConfig) -> Workload:
    """Check runs, methods, budgets, labels and test images; return what to do. Raises ConfigError."""
    check_neighbor_search(config.device, "device", config.ray_address)
    sources = _sources(config.runs)
    if config.network not in ("auto", LINEAR_PROBE) and not sources[0].has_copies:
        raise ConfigError(
            f"network={config.network} learns from copies of the images, and {sources[0].run_dir.uri} keeps none, as "
            f"its selection needed none: give network={LINEAR_PROBE}"
        )
    check_image_size("image_size", config.image_size, sources[0].config.embed.proxy_image_size)
    first = sources[0].run_dir
    entries = tuple(entry for method in config.methods for entry in _entries(method, sources, config))
    refuse_same_lines([entry.name for entry in entries])
    index = first.complete_marker(IndexResult.stage)
    label = config.pool.label or index.config.get("pool.label")
    if label is None:
        raise ConfigError(f"{first.uri} has no true labels, as its pool.label was null: give pool.label=...")
    counts = _counts(config, sources[0].num_samples)
    columns = PoolColumns(index.config.get("pool.image_column"), label)
    pool_uri, pool_format = index.config["pool.uri"], index.config.get("pool.format", "auto")
    workload = Workload(sources, entries, counts, columns, pool_uri, pool_format)
    listed = list_test_images(config.test_uri, workload.pool_format, columns)
    names = tuple(IndexResult.read(first).label_names)
    # Without names the labels are integers, or the run copied none: then they are numbered, and compared with the test
    # images', once they are read.
    if names:
        class_numbers(config.test_uri, listed, names)
    refuse_shared_images(config.test_uri, listed, first)
    return workload


def _sources(uris: list[str]) -> tuple[Source, ...]:
    """Return the runs. Raises ConfigError unless they are complete, undamaged, and of one pool."""
    run_dirs = [RunDir(uri) for uri in uris]
    bases = [config_of(run_dir) for run_dir in run_dirs]
    for run_dir in run_dirs:
        damage = [line for stage in STAGES for line in run_dir.damage(stage.name)]
        if damage:
            raise ConfigError(
                f"{run_dir.uri} is damaged: {'; '.join(damage)}. Run the pipeline there with on_change=rerun."
            )
        if _pool_of(run_dir) != _pool_of(run_dirs[0]):
            raise ConfigError(
                f"{run_dir.uri} is a run of another pool than {run_dirs[0].uri}: give runs of the same pool"
            )
    return tuple(map(Source, run_dirs, bases, _names_of(run_dirs)))


def _names_of(run_dirs: list[RunDir]) -> list[str]:
    """Return a name for each run: how its pseudo-labels were made, or its folder if two runs share that."""
    methods = [
        ClusterResult.read(run_dir).method if run_dir.success_marker(ClusterResult.stage) else "none"
        for run_dir in run_dirs
    ]
    folders = [filesystem.basename(run_dir.uri.rstrip("/")) for run_dir in run_dirs]
    for names in (methods, folders):
        if len(set(names)) == len(names):
            return names
    raise ConfigError(
        f"runs={[run_dir.uri for run_dir in run_dirs]}: two folders have the same name, which labels a run in the "
        "table: rename one"
    )


def _pool_of(run_dir: RunDir) -> tuple[Mapping[str, Any], int]:
    """Return what identifies a run's pool: the pool keys except the label, and the number of images."""
    index = run_dir.complete_marker(IndexResult.stage)
    keys = {key: value for key, value in index.config.items() if key != "pool.label"}
    return keys, IndexResult.read(run_dir).rows


def _entries(text: str, sources: tuple[Source, ...], config: EvaluateRunsConfig) -> list[Entry]:
    """Return the lines of one method, one for each run that `made_from` of the method names."""
    name, _ = parse_method(text)
    method = METHODS[name]
    chosen = sources
    if method.made_from == "first run":
        chosen = sources[:1]
    elif method.made_from == "embeddings":
        # The first run of each distinct embeddings: of equal keys a dict keeps the last value, so it is filled in
        # reverse.
        by_embeddings = {source.run_dir.identity("embed"): source for source in reversed(sources)}
        chosen = tuple(by_embeddings.values())[::-1]
    entries = []
    for source in chosen:
        selection = None if method.select_keys is None else _config_of(text, name, source, config)
        line = text if selection is None else line_name(text, selection)
        entries.append(Entry(f"{line}-{source.name}" if len(chosen) > 1 else line, name, source, selection))
    return entries


def line_name(text: str, selection: Config) -> str:
    """Return how tables name a method of an evaluation: `run` by the method that selects, any other as it was typed."""
    name, keys = parse_method(text)
    if name != "run":
        return text
    return "+".join([name_in_tables(selection.select.method), *(key for key in keys if not key.startswith("method="))])


def parse_method(text: str) -> tuple[str, list[str]]:
    """Return (method, keys of select) of a text such as elfs+score=el2n.

    Raises ConfigError for an unknown method, and for keys of a method that stage select does not make.
    """
    name, *keys = text.split("+")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3)
        raise ConfigError(f"methods: {text!r} must be one of {', '.join(close or METHODS)}")
    if keys and METHODS[name].select_keys is None:
        raise ConfigError(
            f"methods: {text!r}: {name} is not made by select and takes none of its keys: give {name} alone"
        )
    return name, keys


def _config_of(text: str, name: str, source: Source, config: EvaluateRunsConfig) -> Config:
    """Return the config of a selection from a finished run. Raises ConfigError if it cannot be made."""
    hard_fraction = _hard_fraction(source, config, name) if name in ("run", "elfs") else None
    try:
        selection = selection_config(text, config, source.base, source.run_dir.uri, config.budgets, hard_fraction)
    except ConfigError as error:
        if "cluster.num_neighbors" not in str(error):
            raise
        # The key is none of an evaluation's: the neighbours must come from the run.
        raise ConfigError(
            f"{error} to {source.run_dir.uri}, run again with on_change=rerun, or leave {text} out of methods"
        ) from error
    try:
        check_stages(selection, source.run_dir)
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
    """Return the config of a method's selection: the run's, overridden by the method's keys, then by those of the text.

    hard_fraction: the one that run and elfs use; aum_ccs has a key for its own. Raises ConfigError for keys that
    contradict each other.
    """
    name, keys = parse_method(text)
    # 0 where the method ignores it: the run's list may have another length than these budgets.
    fraction = {"run": hard_fraction, "elfs": hard_fraction, "aum_ccs": settings.proxy.ccs_hard_fraction}.get(name, 0)
    overrides = [
        f"run_dir={run_uri}",
        f"budget={budgets[0] if len(budgets) == 1 else list(budgets)}",
        "on_change=refuse",  # an evaluation must never remake a stage of the run
        f"select.hard_fraction={fraction}",
    ]
    overrides += [*(METHODS[name].select_keys or ()), *(f"select.{key}" for key in keys)]
    try:
        return load_config(None, overrides, base=base)
    except ConfigError as error:
        raise ConfigError(f"methods: {text}: {error}") from error


def _hard_fraction(source: Source, config: EvaluateRunsConfig, name: str) -> Any:
    """Return the hard fraction of run or elfs: that of the config or the run's, one for all budgets or one for each."""
    if config.hard_fraction != AS_IN_RUN:
        return config.hard_fraction
    if name == "elfs" and source.base["select"]["method"] not in USES_HARD_FRACTION:
        return "auto"  # the run has none
    fraction, budget = source.base["select"]["hard_fraction"], source.base["budget"]
    if not isinstance(fraction, list):
        return fraction
    budgets = budget if isinstance(budget, list) else [budget]
    of_budget = dict(zip(map(str, budgets), fraction, strict=True))
    missing = [budget for budget in config.budgets if str(budget) not in of_budget]
    if missing:
        raise ConfigError(
            f"{source.run_dir.uri} has one hard fraction for each of its budgets, but none for {missing}: give "
            "hard_fraction=... (a number, auto, search, or a list with one for each budget)"
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
    """Describe what an evaluation would do. Raises ConfigError as it would."""
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
    methods = [entry.method_name for entry in workload.entries]
    has_copies = workload.sources[0].has_copies
    trainings = describe_trainings(config, config.ray_address, has_copies, methods, len(config.budgets))
    lines.append(f"{trainings}, to {config.out}")
    return "\n".join(lines)


def describe_trainings(
    settings: EvaluateConfig, ray_address: str | None, has_copies: bool, methods: Sequence[str], num_budgets: int
) -> str:
    """Return a line with the number of trainings; the method full has one budget, all images."""
    from elfs_ray.runtime.cluster import find_devices  # late, so that `--help` does not import Ray

    num_selections = sum(1 if method == "full" else num_budgets for method in methods)
    num_trainings = num_selections * settings.num_seeds
    network = network_on(settings.network, find_devices(ray_address).resolve(settings.device, "device"), has_copies)
    if network == LINEAR_PROBE:
        return f"evaluate  {num_trainings:,} linear probes of the embeddings"
    return f"evaluate  {num_trainings:,} trainings of {network}, {settings.iterations:,} steps each"
