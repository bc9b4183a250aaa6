"""Run an evaluation: select, read labels and test images, train on each selection, write the tables.

Everything is written to the folder `out` of the config:

    selections/<line>/<hash>/coreset/...   the coreset of each method at each budget, as stage select writes it; a
                                           coreset that a run has made already is read from the run
    selections/<line>/<hash>.parquet       the ids that kmeans_centres or typiclust chose
    supervised/<hash>/                     the proxy trained on true labels: a run directory with the stages cluster,
                                           train and select
    badge/<hash>/round-0000.parquet        the samples that a round of BADGE bought
    trials/<hash>-seed0.json               the result of one training
    test/                                  the embeddings of the test images, for a linear probe
    quality/knn-<hash>.json                how often nearest neighbours share a class
    results.parquet, results.md, results.svg

Selections and trainings are named by a hash of everything that decides them. So the same command resumes where it was
stopped, and more methods, budgets or seeds add to what exists.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

from elfs_ray.config import LINEAR_PROBE, ConfigError, TrainConfig
from elfs_ray.evaluation.chart import draw_chart
from elfs_ray.evaluation.from_scratch import FromScratch
from elfs_ray.evaluation.keys import EvaluateRunsConfig, network_on
from elfs_ray.evaluation.leaks import Leaks, find_leaks
from elfs_ray.evaluation.probe import Probes, embed_test_images
from elfs_ray.evaluation.quality import judge_clustering, judge_embeddings
from elfs_ray.evaluation.report import Line, Quality, Results, to_markdown
from elfs_ray.evaluation.selections import Selection, buy_and_select, select_without_labels
from elfs_ray.evaluation.trials import Learner, Trial, TrialPlace, run_trials, summarize
from elfs_ray.evaluation.true_labels import TrueLabels, list_labels, load_test_images, read_labels
from elfs_ray.evaluation.workload import Workload, make_workload
from elfs_ray.methods.numeric.faiss_build import device_of_search
from elfs_ray.methods.numeric.precision import resolve_precision
from elfs_ray.methods.training.classifier import ClassifierSettings
from elfs_ray.pipeline.connection import connect, fits_this_process
from elfs_ray.pipeline.runner import locked
from elfs_ray.runtime.cluster import resolve_device
from elfs_ray.runtime.progress import say
from elfs_ray.runtime.tasks import task_settings
from elfs_ray.stages import train as proxy
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.stages.training.classifier_inputs import training_settings
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

RESULTS_MD, RESULTS_SVG = "results.md", "results.svg"


def run(config: EvaluateRunsConfig, train: TrainConfig | None = None) -> Results:
    """Select, train, test and write the tables. Raises ConfigError before any work.

    train: augmentation and optimiser of the trainings, if the runs trained nothing; the defaults if not known.
    """
    workload = make_workload(config)
    if _needs_ray(config, workload):
        connect(config.ray_address, show_worker_logs=config.ray_logs)
    device = resolve_device(config.device, "device")
    config = replace(config, network=network_on(config.network, device, workload.sources[0].has_copies))
    settings = _settings(config, workload, device, train)
    place = TrialPlace(device, config.gpus_per_training if device == "cuda" else 0.0, config.cpus_per_training)
    out = RunDir(config.out)
    with locked(out), task_settings():
        # Before any label is read: what the label-free methods select cannot depend on one.
        selections = select_without_labels(config, workload, out)
        labels = _labels(workload)
        selections += buy_and_select(config, workload, out, labels, settings, place)
        order = {entry.name: position for position, entry in enumerate(workload.entries)}
        selections.sort(key=lambda selection: order[selection.entry.name])
        learner = _learner(config, workload, out, labels, settings, device)
        rows = _train(config, out, selections, learner, place)
        table = pa.Table.from_pylist(rows, schema=schema.RESULTS_SCHEMA)
        filesystem.write_table(out.path(schema.RESULTS_FILE), table)
        leaks = _leaks(config, workload, learner, out, device)
        results = Results(config.network, tuple(_lines(rows)), _quality(workload, out, labels, device), leaks)
        filesystem.write_bytes(out.path(RESULTS_MD), to_markdown(config, workload, results).encode())
        _write_chart(config, workload, out, results)
        return results


def _needs_ray(config: EvaluateRunsConfig, workload: Workload) -> bool:
    """Return whether an evaluation needs Ray: by the sizes of its runs, and by how it trains proxies on true labels."""
    num_images = max(source.num_samples for source in workload.sources)
    trains = any(entry.method.is_supervised for entry in workload.entries)
    return (trains and proxy.STAGE.needs_ray(workload.sources[0].config)) or not fits_this_process(
        config.ray_address, num_images
    )


def _write_chart(config: EvaluateRunsConfig, workload: Workload, out: RunDir, results: Results) -> None:
    """Write the chart, or say how to get one if matplotlib is not installed."""
    try:
        chart = draw_chart(config, workload, results.lines)
    except ImportError as error:
        say(f"no chart: {error}; run pip install 'elfs-ray[chart]', then the same command again")
        filesystem.delete(out.path(RESULTS_SVG))  # it may be there from earlier results, and would contradict these
        return
    filesystem.write_bytes(out.path(RESULTS_SVG), chart)


def written_files(out: RunDir) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the files of results that exist."""
    for name, file in (("table", RESULTS_MD), ("chart", RESULTS_SVG), ("results", schema.RESULTS_FILE)):
        if filesystem.exists(out.path(file)):
            yield name, out.path(file)


def _settings(
    config: EvaluateRunsConfig, workload: Workload, device: str, train: TrainConfig | None = None
) -> ClassifierSettings | None:
    """Return the settings of every training: the keys of the evaluation, the rest as in the first run's stage train.

    Of a run without that stage no tables tell its keys: they are then those of `train`.

    None for a linear probe, which has no settings.
    """
    if config.network == LINEAR_PROBE:
        return None
    first = workload.sources[0]
    has_trained = first.run_dir.success_marker(TrainResult.stage) is not None
    return training_settings(
        first.config.train if has_trained or train is None else train,
        network=config.network,
        iterations=config.iterations,
        batch_size=config.batch_size,
        lr=config.lr,
        num_tests=config.num_tests,
        precision=resolve_precision(config.precision, torch.device(device)),
        compile=config.compile,
    )


def _labels(workload: Workload) -> TrueLabels:
    run_dir = workload.sources[0].run_dir
    index = run_dir.complete_marker(IndexResult.stage)
    if index.config.get("pool.label") == workload.columns.label:
        return read_labels(run_dir)
    return list_labels(run_dir, workload.pool_uri, workload.pool_format, workload.columns)


def _learner(
    config: EvaluateRunsConfig,
    workload: Workload,
    out: RunDir,
    labels: TrueLabels,
    settings: ClassifierSettings | None,
    device: str,
) -> Learner:
    """Return what learns from the selections, with the test images in the form that it needs."""
    run_dir = workload.sources[0].run_dir
    if settings is None:
        test = embed_test_images(config.test_uri, workload, labels.names, device, out.path("test"))
        return Probes(run_dir, labels, test)
    embed = workload.sources[0].config.embed
    size = config.image_size or embed.proxy_image_size
    images = load_test_images(config.test_uri, workload.pool_format, workload.columns, embed, labels.names, size)
    return FromScratch(run_dir, size, labels, images, settings)


def _train(
    config: EvaluateRunsConfig,
    out: RunDir,
    selections: list[Selection],
    learner: Learner,
    place: TrialPlace,
) -> list[dict[str, Any]]:
    """Learn from every selection; return the rows of results.parquet."""
    trials = [Trial(selection.sample_ids, selection.seed) for selection in selections]
    accuracies = run_trials(trials, learner, out.path("trials"), place)
    return [
        {
            "selection": selection.entry.name,
            "run": selection.entry.source.name,
            "budget": selection.budget,
            "hard_fraction": selection.hard_fraction,
            "network": config.network,
            "iterations": None if config.network == LINEAR_PROBE else config.iterations,
            **of_trial,
        }
        for selection, of_trial in zip(selections, accuracies, strict=True)
    ]


def _lines(rows: list[dict[str, Any]]) -> Iterator[Line]:
    """Yield the lines of the table, in the order of the rows."""
    for name in dict.fromkeys(row["selection"] for row in rows):
        of_line = [row for row in rows if row["selection"] == name]
        cells = {
            budget: summarize(row for row in of_line if row["budget"] == budget)
            for budget in dict.fromkeys(row["budget"] for row in of_line)
        }
        fractions = {row["budget"]: row["hard_fraction"] for row in of_line if row["hard_fraction"] is not None}
        yield Line(name, cells, fractions)


def _leaks(config: EvaluateRunsConfig, workload: Workload, learner: Learner, out: RunDir, device: str) -> Leaks | None:
    """Return which test images have a near-duplicate in the pool, where the first run says what one is."""
    source = workload.sources[0]
    threshold = source.config.duplicates.threshold
    if threshold is None:
        return None
    if isinstance(learner, Probes):
        test = learner.test
    else:
        # Networks learn from images, but embedding the test images once takes a fraction of their trainings' time.
        try:
            test = embed_test_images(config.test_uri, workload, learner.labels.names, device, out.path("test"))
        except (ConfigError, OSError) as error:  # the encoder's weights may be on the machine of the run alone
            say(f"leaks     not looked for: {error}")
            return None
    place = device_of_search(device)
    return find_leaks(source.run_dir, test.embeddings, test.uris, threshold, place, out.path("quality"))


def _quality(workload: Workload, out: RunDir, labels: TrueLabels, device: str) -> dict[str, Quality]:
    place = device_of_search(device)
    return {
        source.name: Quality(
            judge_clustering(source.run_dir, labels) if source.has_clusters else None,
            judge_embeddings(source.run_dir, labels, int(source.base["seed"]), place, out.path("quality")),
        )
        for source in workload.sources
    }
