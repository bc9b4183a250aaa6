"""Select the samples of every line of an evaluation.

Reads   the tables of the runs; true labels only for badge and the supervised methods; never a test image
Writes  selections/, badge/ and supervised/ in the folder `out` of the config (see run.py)
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.config import LINEAR_PROBE, USES_HARD_FRACTION, Config, load_config
from elfs_ray.evaluation.badge import BadgeJob, buy_labels, round_ends
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.report import ALL
from elfs_ray.evaluation.supervised import write_labels_as_clusters
from elfs_ray.evaluation.trials import TrialPlace
from elfs_ray.evaluation.true_labels import TrueLabels, digest
from elfs_ray.evaluation.workload import Entry, Source, Workload
from elfs_ray.methods.selection.cluster_centres import kmeans_centres, typiclust
from elfs_ray.methods.training.classifier import ClassifierSettings
from elfs_ray.pipeline import reselect
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.train.run import run_train
from elfs_ray.stages.training.classifier_inputs import load_embeddings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, Overlay, RunDir

# What the supervised proxy's run directory holds itself: markers of stages and tables by the start of their names
# ("cluster" is clusters/, too). All else, such as index/ and proxy_images/, is read from the run.
SUPERVISED_TABLES = ("cluster", "train", "dynamics", "scores")
FROM_EMBEDDINGS = {"kmeans_centres": kmeans_centres, "typiclust": typiclust}
"""Baselines that stage select does not make: a task each, for pools whose embeddings fit into its memory."""


@dataclass(frozen=True)
class Selection:
    """The samples that a line trains on, at one budget, for one seed.

    sample_ids: ascending (n,) int64. hard_fraction: None if the method has none.
    """

    entry: Entry
    budget: str
    seed: int
    sample_ids: np.ndarray
    hard_fraction: float | None = None


def select_without_labels(config: EvaluateRunsConfig, workload: Workload, out: RunDir) -> list[Selection]:
    """Select for every line that needs no true labels, from the tables of its run."""
    selections = []
    for entry in workload.entries:
        if entry.method_name == "full":
            everything = _embedded(workload.sources[0])
            selections += [Selection(entry, ALL, seed, everything) for seed in range(config.num_seeds)]
        elif entry.method_name in FROM_EMBEDDINGS:
            selections += _from_embeddings(config, workload, entry, out.path("selections", entry.name))
        elif entry.config is not None and not entry.method.is_supervised:
            selections += _coresets(config, entry, entry.source.run_dir, out.path("selections", entry.name))
    return selections


def buy_and_select(
    config: EvaluateRunsConfig,
    workload: Workload,
    out: RunDir,
    labels: TrueLabels,
    settings: ClassifierSettings | None,
    place: TrialPlace,
) -> list[Selection]:
    """Select for the lines that need true labels: badge, which trains with `settings`, and the supervised methods.

    settings: None for a linear probe.
    """
    selections = []
    run_dir = None
    for entry in workload.entries:
        if entry.method_name == "badge":
            selections += _buy(config, workload, out, entry, labels, settings, place)
        elif entry.method.is_supervised:
            # One proxy serves all supervised methods: they differ in the score only.
            run_dir = run_dir or _train_supervised(config, workload.sources[0], out, labels)
            selections += _coresets(config, entry, run_dir, out.path("selections", entry.name))
    return selections


def _embedded(source: Source) -> np.ndarray:
    """Return the ids of the samples that can be selected, ascending (n,) int64."""
    embedded = source.run_dir.read_column(schema.EMBEDDINGS, column=schema.SAMPLE_ID)
    return np.setdiff1d(embedded, gone_ids(source.run_dir), assume_unique=True)


def _from_embeddings(config: EvaluateRunsConfig, workload: Workload, entry: Entry, folder: str) -> list[Selection]:
    """Select by a method that reads embeddings alone, unless it was done before; one selection for all seeds."""
    sample_ids, seed, run_dir = _embedded(entry.source), int(entry.source.base["seed"]), entry.source.run_dir
    made_from = (entry.method_name, run_dir.identity("embed"), sample_ids, seed)
    paths = {count: filesystem.join(folder, f"{digest(*made_from, count)}.parquet") for count in workload.counts}
    left = {count: path for count, path in paths.items() if not filesystem.exists(path)}
    tasks = [(entry.method_name, run_dir, sample_ids, count, seed, path) for count, path in left.items()]
    for position, seconds in run_tasks(_select_from_embeddings, tasks):
        say(f"select    {entry.name}, {list(left)[position]:,} images in {format_duration(seconds)}")
    return [
        Selection(entry, str(budget), seed, np.sort(filesystem.read_table(paths[count])[schema.SAMPLE_ID].to_numpy()))
        for seed in range(config.num_seeds)
        for budget, count in zip(config.budgets, workload.counts, strict=True)
    ]


def _select_from_embeddings(
    method: str, run_dir: RunDir, sample_ids: np.ndarray, count: int, seed: int, path: str
) -> float:
    """Write the ids of a selection in its order; return the seconds that it took."""
    start_s = time.monotonic()
    torch.set_num_threads(1)
    chosen = FROM_EMBEDDINGS[method](load_embeddings(run_dir, sample_ids), sample_ids, count, seed)
    filesystem.write_table(path, pa.table({schema.SAMPLE_ID: sample_ids[chosen]}))
    return time.monotonic() - start_s


def _coresets(config: EvaluateRunsConfig, entry: Entry, run_dir: RunDir, out: str) -> list[Selection]:
    """Return the coresets of a line: those of the run if it made the same selection, else selected into `out`."""
    assert entry.config is not None
    selections = []
    for seed in range(config.num_seeds):
        selection = replace(entry.config, seed=seed) if entry.method.is_per_seed else entry.config
        folder, coresets = _kept_or_written(selection, run_dir, out, entry.name)
        for budget, table in zip(selection.budgets, schema.coreset_tables(selection.budgets), strict=True):
            ids = np.sort(folder.read_column(table, column=schema.SAMPLE_ID))
            has_fraction = selection.select.method in USES_HARD_FRACTION
            fraction = coresets[table].hard_fraction if has_fraction else None
            selections.append(Selection(entry, str(budget), seed, ids, fraction))
    return selections


def _kept_or_written(
    config: Config, run_dir: RunDir, out: str, name: str
) -> tuple[RunDir, Mapping[str, CoresetResult]]:
    """Return (folder, coresets by table) of a selection, after running stage select unless the selection exists."""
    wanted = reselect.marker_of(config, run_dir)
    folder = Overlay(filesystem.join(out, wanted.identity), run_dir, reselect.SELECTION_PREFIXES)
    # The run may have made this selection, perhaps with a search for its hard fraction, which takes many trainings.
    for place in (run_dir, folder):
        marker = place.success_marker(reselect.SELECT)
        if marker is not None and marker.is_made_as(wanted) and not place.damage(reselect.SELECT):
            return place, SelectResult.from_json(marker.result).coresets
    marker = reselect.write(config, folder)
    say(f"select    {name} in {format_duration(marker.seconds)}")
    return folder, SelectResult.from_json(marker.result).coresets


def _buy(
    config: EvaluateRunsConfig,
    workload: Workload,
    out: RunDir,
    entry: Entry,
    labels: TrueLabels,
    settings: ClassifierSettings | None,
    place: TrialPlace,
) -> list[Selection]:
    """Let BADGE buy labels; one order of buying serves all budgets and seeds."""
    source, pool = entry.source, _embedded(entry.source)
    if settings is not None:
        settings = replace(settings, iterations=config.badge.iterations or max(1, config.iterations // 4))
    ends = round_ends(workload.counts, config.badge.rounds)
    size = config.image_size or source.base["embed"]["proxy_image_size"]
    job = BadgeJob(source.run_dir, size, pool, ends, settings, int(source.base["seed"]))
    trained_with = LINEAR_PROBE if settings is None else (size, settings.deciding())
    made_from = (source.run_dir.identity("embed"), trained_with, ends, job.seed, pool, labels.of_id)
    bought = buy_labels(job, labels, out.path("badge", digest(*made_from)), place)
    return [
        Selection(entry, str(budget), seed, np.sort(bought[:count]))
        for seed in range(config.num_seeds)
        for budget, count in zip(config.budgets, workload.counts, strict=True)
    ]


def _train_supervised(config: EvaluateRunsConfig, source: Source, out: RunDir, labels: TrueLabels) -> RunDir:
    """Train the run's proxy on true labels with stage train, unless done before; return its run directory."""
    made_from = (source.run_dir.identity("train"), labels.of_id)
    run_dir = Overlay(out.path("supervised", digest(*made_from)), source.run_dir, SUPERVISED_TABLES)
    if run_dir.success_marker("cluster") is None:
        write_labels_as_clusters(run_dir, source.run_dir, labels)
    if run_dir.success_marker("train") is None:
        overrides = [f"run_dir={run_dir.uri}", f"train.device={config.device}"]
        if config.proxy.num_workers is not None:
            overrides.append(f"train.num_workers={config.proxy.num_workers}")
        result = run_train(load_config(None, overrides, base=source.base), run_dir)
        run_dir.mark_complete(Marker("train", {}, {"cluster": run_dir.identity("cluster")}, result.to_json()))
    return run_dir
