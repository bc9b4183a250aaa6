"""Runs an evaluation: selections first, from the runs' tables alone; then labels and test images, trainings, tables.

Everything lies in the folder that the config names as `out`:

    selections/<line>/<hash>/coreset/...   the coreset of each method at each budget, as stage select writes them
    supervised/                            the proxy trained on true labels, a run directory of the stages train, select
    badge/<hash>/round-0000.parquet        what each round of BADGE bought
    trials/<hash>-seed0.json               one training each
    results.parquet, results.md, results.svg

A training and a selection are named by a hash of what decides them, so the same command goes on where it was stopped,
and more methods, budgets or seeds only add to what is there.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config, load_config
from elfs_ray.evaluation.chart import draw_chart
from elfs_ray.evaluation.keys import ComparisonConfig
from elfs_ray.evaluation.plan import SUPERVISED, Entry, Plan, Source, make_plan
from elfs_ray.evaluation.report import Line, to_markdown
from elfs_ray.methods.training.classifier import ClassifierSettings
from elfs_ray.pipeline import reselect
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.progress import format_duration, say
from elfs_ray.stages.select import SelectResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import Marker, Overlay, RunDir

RESULTS_MD, RESULTS_SVG = "results.md", "results.svg"
SUPERVISED_HERE = ("cluster", "train", "dynamics", "scores")


@dataclass(frozen=True)
class Chosen:
    """A line's samples at one budget for one seed: ascending ids (n,) int64; its hard fraction where it has one."""

    entry: Entry
    budget: str
    seed: int
    sample_ids: np.ndarray
    hard_fraction: float | None = None


def run(config: ComparisonConfig) -> list[Line]:
    """Select, train, test and write the tables; the lines of the table. Raises ConfigError before any work."""
    from elfs_ray.runtime.cluster import connect, resolve_device

    plan = make_plan(config)
    connect(config.ray_address, show_worker_logs=config.ray_logs)
    device = resolve_device(config.device, "device")
    out = RunDir(config.out)
    with locked(out):
        chosen = select_without_labels(config, plan, out)
        chosen += _select_with_labels(config, plan, out, device)
        order = {entry.name: position for position, entry in enumerate(plan.entries)}
        chosen.sort(key=lambda own: order[own.entry.name])
        rows = _train(config, plan, out, chosen, device)
        table = pa.Table.from_pylist(rows, schema=schema.COMPARISON_SCHEMA)
        filesystem.write_table(out.path(schema.RESULTS_FILE), table)
        return _report(config, plan, out, rows)


def select_without_labels(config: ComparisonConfig, plan: Plan, out: RunDir) -> list[Chosen]:
    """The samples of every line that needs no true label, from the tables of its run; no test image is read."""
    chosen = []
    for entry in plan.entries:
        if entry.method == "full":
            (first, *_) = plan.sources
            everything = first.run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=schema.SAMPLE_ID)
            chosen += [Chosen(entry, "all", seed, np.sort(everything)) for seed in range(config.seeds)]
        elif entry.config is not None and entry.method not in SUPERVISED:
            chosen += _coresets(config, entry, entry.source.run_dir, out.path("selections", entry.name))
    return chosen


def _coresets(config: ComparisonConfig, entry: Entry, run_dir: RunDir, out: str) -> list[Chosen]:
    """A line's coresets, written below `out` by stage select's own functions unless they are there."""
    assert entry.config is not None
    chosen = []
    for seed in range(config.seeds):
        own = replace(entry.config, seed=seed) if entry.is_drawn else entry.config
        identity = reselect.marker_of(own, run_dir).identity
        folder = Overlay(filesystem.join(out, identity), run_dir, reselect.OWN_TABLES)
        marker = folder.success_marker(reselect.SELECT)
        if marker is None or folder.damage(reselect.SELECT):
            marker = _write_coresets(own, folder, entry.name)
        coresets = SelectResult.from_json(marker.result).coresets
        for budget, table in zip(own.budgets, schema.coreset_tables(own.budgets), strict=True):
            ids = np.sort(folder.read_column(table, column=schema.SAMPLE_ID))
            has_fraction = own.select.method in ("double_end", "stratified")
            fraction = coresets[table].hard_fraction if has_fraction else None
            chosen.append(Chosen(entry, str(budget), seed, ids, fraction))
    return chosen


def _write_coresets(config: Config, folder: Overlay, name: str) -> Marker:
    marker = reselect.write(config, folder)
    say(f"select    {name} in {format_duration(marker.seconds)}")
    return marker


def _select_with_labels(config: ComparisonConfig, plan: Plan, out: RunDir, device: str) -> list[Chosen]:
    """The samples of the lines that buy labels or have them all."""
    chosen = []
    run_dir = None
    for entry in plan.entries:
        if entry.method == "badge":
            chosen += _buy_labels(config, plan, out, entry, device)
        elif entry.method in SUPERVISED:
            run_dir = run_dir or _train_supervised(config, plan, out)
            chosen += _coresets(config, entry, run_dir, out.path("selections", entry.name))
    return chosen


def _buy_labels(config: ComparisonConfig, plan: Plan, out: RunDir, entry: Entry, device: str) -> list[Chosen]:
    from elfs_ray.evaluation.badge import BadgeJob, buy_labels, round_ends
    from elfs_ray.evaluation.data import digest

    source, labels = entry.source, _labels(plan)
    pool = np.sort(source.run_dir.read_column(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, column=schema.SAMPLE_ID))
    settings = _settings(config, source, device, config.badge.iterations or max(1, config.iterations // 4))
    ends = round_ends(plan.counts, config.badge.rounds)
    size = source.base["embed"]["proxy_image_size"]
    job = BadgeJob(source.run_dir, size, pool, ends, settings, int(source.base["seed"]))
    made_of = (source.run_dir.identity("embed"), sorted(asdict(settings).items()), ends, job.seed, pool, labels.of_id)
    bought = buy_labels(job, labels, out.path("badge", digest(*made_of)), _place(config, device))
    return [
        Chosen(entry, str(budget), seed, np.sort(bought[:count]))
        for seed in range(config.seeds)
        for budget, count in zip(config.budgets, plan.counts, strict=True)
    ]


def _train_supervised(config: ComparisonConfig, plan: Plan, out: RunDir) -> RunDir:
    """The first run's proxy, trained on true labels by stage train, unless it is there; where its scores will be."""
    from elfs_ray.evaluation.data import digest
    from elfs_ray.evaluation.supervised import write_labels_as_clusters
    from elfs_ray.stages.train.run import run_train

    source, labels = plan.sources[0], _labels(plan)
    made_of = (source.run_dir.identity("train"), labels.of_id)
    run_dir = Overlay(out.path("supervised", digest(*made_of)), source.run_dir, SUPERVISED_HERE)
    if run_dir.success_marker("cluster") is None:
        write_labels_as_clusters(run_dir, source.run_dir, labels)
    if run_dir.success_marker("train") is None:
        overrides = [f"run_dir={run_dir.uri}", f"train.device={config.device}"]
        if config.proxy.num_workers is not None:
            overrides.append(f"train.num_workers={config.proxy.num_workers}")
        result = run_train(load_config(None, overrides, base=source.base), run_dir)
        run_dir.mark_complete(Marker("train", {}, {"cluster": run_dir.identity("cluster")}, result.to_json()))
    return run_dir


def _train(
    config: ComparisonConfig, plan: Plan, out: RunDir, chosen: list[Chosen], device: str
) -> list[dict[str, Any]]:
    """A training on every selection; the rows of the results."""
    from elfs_ray.evaluation.data import load_test_images
    from elfs_ray.evaluation.trials import Trial, TrialData, run_trials

    source, labels = plan.sources[0], _labels(plan)
    embed = load_config(None, [f"run_dir={source.run_dir.uri}"], base=source.base).embed
    test = load_test_images(config.test_uri, plan.pool_format, plan.columns, embed, labels.names)
    data = TrialData(source.run_dir, embed.proxy_image_size, labels, test)
    trials = [Trial(own.sample_ids, own.seed) for own in chosen]
    settings = _settings(config, source, device, config.iterations)
    found = run_trials(trials, data, settings, out.path("trials"), _place(config, device))
    return [
        {
            "selection": own.entry.name,
            "run": own.entry.source.name,
            "budget": own.budget,
            "hard_fraction": own.hard_fraction,
            "iterations": config.iterations,
            **metrics,
        }
        for own, metrics in zip(chosen, found, strict=True)
    ]


def _report(config: ComparisonConfig, plan: Plan, out: RunDir, rows: list[dict[str, Any]]) -> list[Line]:
    """Write the table and the chart; the lines of the table."""
    from elfs_ray.evaluation.quality import judge_clustering
    from elfs_ray.evaluation.trials import summarize

    lines = []
    for name in dict.fromkeys(row["selection"] for row in rows):
        own = [row for row in rows if row["selection"] == name]
        cells = {
            budget: summarize(row for row in own if row["budget"] == budget)
            for budget in dict.fromkeys(row["budget"] for row in own)
        }
        fractions = {row["budget"]: row["hard_fraction"] for row in own if row["hard_fraction"] is not None}
        lines.append(Line(name, cells, fractions))
    labels = _labels(plan)
    quality = {source.name: judge_clustering(source.run_dir, labels) for source in plan.sources}
    filesystem.write_bytes(out.path(RESULTS_MD), to_markdown(config, plan, lines, quality).encode())
    filesystem.write_bytes(out.path(RESULTS_SVG), draw_chart(config, plan, lines).encode())
    return lines


def _labels(plan: Plan) -> Any:
    from elfs_ray.evaluation.data import list_labels, read_labels

    run_dir = plan.sources[0].run_dir
    index = run_dir.success_marker("index")
    assert index is not None
    if index.config.get("pool.label") == plan.columns.label:
        return read_labels(run_dir)
    return list_labels(run_dir, plan.pool_uri, plan.pool_format, plan.columns)


def _settings(config: ComparisonConfig, source: Source, device: str, iterations: int) -> ClassifierSettings:
    """How every training of a config runs; what it does not say is as the first run's proxy was trained."""
    import torch

    from elfs_ray.methods.numeric.precision import resolve_precision
    from elfs_ray.stages.training.classifier_inputs import training_settings

    return training_settings(
        load_config(None, [f"run_dir={source.run_dir.uri}"], base=source.base).train,
        network=config.network,
        iterations=iterations,
        batch_size=config.batch_size,
        lr=config.lr,
        num_tests=config.num_tests,
        precision=resolve_precision(config.precision, torch.device(device)),
    )


def _place(config: ComparisonConfig, device: str) -> Any:
    from elfs_ray.evaluation.trials import TrialPlace

    return TrialPlace(device, config.gpus_per_training if device == "cuda" else 0.0, config.cpus_per_training)
