"""Measure the product on one large GPU in a quarter of an hour: CIFAR-10 at 90% and 70% pruned, in repeatable parts.

    until python benchmarks/gpu_quarter.py --data pools/cifar10; do [ $? = 3 ] || break; done
    python benchmarks/gpu_quarter.py --data pools/cifar10 --part encoder [key=value ...]
    python benchmarks/gpu_quarter.py --quick [--folder FOLDER]

--data has train/ and test/ as `elfs-ray prepare` writes them, or train.parquet and test.parquet (image, label). Nothing
else is needed: the encoder, a ResNet-18, is trained on the pool. The parts, in order:

    tests        pytest -m gpu; junit.xml has every failure
    encoder      SimCLR on the pool, compiled
    clusters     embeddings, neighbours, k-means and TEMI with 50 heads
    proxy        ResNet-18 on the pseudo-labels, scores, coresets
    pruned_90    trainings from scratch on 10% of the images: every selection, a few seeds, the same number of steps
    pruned_70    the same on 30%, and on all images
    rates        encoder, k-means and neighbours vs. the GPU's matrix product, and trainings from scratch

Each part writes a line to results.jsonl in --folder once it is finished, and is never repeated; a part that is stopped
in the middle continues from its last epoch or training. Exit code 3 after --minutes means that parts are left: the same
command continues. A part that fails leaves its error in its line, and the parts that do not need it still run; the exit
code is then 1. Keys after the options go to the pipeline, with evaluate. before them to the evaluation, over those of
CIFAR10 below. --quick runs every part on 1,000 digits and CPUs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.gpu_rates import Sizes, measure, search_device
from helpers.reporting import command_line
from helpers.tracks import ROOT, parts_of, run_for, write_digits

from elfs_ray.config import Config, load_config
from elfs_ray.evaluation import run as evaluation
from elfs_ray.evaluation.quality import judge_clustering, judge_embeddings
from elfs_ray.evaluation.report import ALL
from elfs_ray.evaluation.true_labels import read_labels
from elfs_ray.evaluation.workload import load
from elfs_ray.pipeline import runner
from elfs_ray.presets import preset
from elfs_ray.runtime.cluster import connect, num_cpus
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.pretrain import PretrainResult
from elfs_ray.stages.select import SelectResult
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage.run_dir import RunDir

RESULTS = "results.jsonl"
TESTS_LIMIT_S = 60


@dataclass(frozen=True)
class Work:
    """What is measured, where, and how large.

    pipeline, evaluation: keys over the preset cifar10 and of the evaluation. predicted_s: by part, from published and
    earlier rates. sizes: of the part rates.
    """

    pool: Path
    test: Path
    folder: Path
    pipeline: tuple[str, ...]
    evaluation: tuple[str, ...]
    methods: tuple[str, ...]
    predicted_s: dict[str, float]
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def judged(self) -> Path:
        return self.folder / "judged"


NUM_SEEDS = {0.1: 2, 0.3: 1}  # by the share of the images
METHODS = ("random", "elfs", "elfs+hard_fraction=0.4", "elfs+balance=true", "coverage", "auto", "aum_ccs")
CIFAR10: dict[str, Any] = {
    "pipeline": (
        *("embed.encoder=self_supervised", "embed.image_size=null", "pretrain.epochs=130", "pretrain.compile=true"),
        "pretrain.num_workers=1",
        *("pretrain.temperature=0.2", "pretrain.lr=0.15", "pretrain.min_crop_area=0.2"),
        *("train.epochs=25", "train.compile=true", "select.hard_fraction=auto", "budget=[0.1,0.3]"),
    ),
    "evaluation": ("network=resnet18", "iterations=2500", "num_tests=3", "compile=true", "gpus_per_training=0.25"),
    "methods": METHODS,
    "predicted_s": {
        "tests": 60,
        "encoder": 225,
        "clusters": 75,
        "proxy": 65,
        "pruned_90": 205,
        "pruned_70": 65,
        "rates": 60,
    },
}
# With --quick there is neither a GPU nor time: small networks, an epoch or two of everything, and so small a pool that
# all of it runs in this process, without Ray.
QUICK: dict[str, Any] = {
    "pipeline": (
        *("embed.encoder=self_supervised", "embed.image_size=null", "pretrain.profile=cpu", "pretrain.epochs=1"),
        *("embed.proxy_image_size=16", "embed.runtime=torch", "embed.num_workers=1", "cluster.num_workers=1"),
        *("cluster.temi.profile=cpu", "cluster.temi.num_epochs=1", "train.network=small_cnn", "train.epochs=2"),
        *("train.batch_size=128", "select.hard_fraction=auto", "budget=[0.1,0.3]", "ray_address=local"),
    ),
    "evaluation": (
        *("network=small_cnn", "iterations=10", "num_tests=1", "batch_size=32", "lr=0.05", "ray_address=local"),
    ),
    "methods": METHODS,
    "predicted_s": {},
    "sizes": Sizes("pixels", 16, num_points=5000, num_clusters=20, network="small_cnn", batch_size=32, num_steps=1),
}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument(
        "--folder", type=Path, help="of the run and results; default runs/gpu_quarter, with --quick none"
    )
    parser.add_argument("--part", choices=list(PARTS), action="append", help="run this part only; repeatable")
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after so many minutes")
    parser.add_argument("--quick", action="store_true", help="every part on 1,000 digits and CPUs")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="keys of the pipeline")
    arguments = parser.parse_args()
    names = arguments.part or list(PARTS)
    if arguments.quick:
        with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
            work = Work(*write_digits(Path(folder)), Path(folder), **QUICK)
            return run_for(arguments.minutes, partial(run_parts, work, names))
    if arguments.data is None:
        parser.error("give --data, a folder with train.parquet and test.parquet, or --quick")
    work = Work(*parts_of(arguments.data), arguments.folder or Path("runs/gpu_quarter"), **_with(arguments.keys))
    return run_for(arguments.minutes, partial(run_parts, work, names))


def _with(keys: list[str]) -> dict[str, Any]:
    """Return the settings for a GPU with keys of the pipeline and, where they begin with evaluate., the evaluation."""
    of_evaluation = [key.removeprefix("evaluate.") for key in keys if key.startswith("evaluate.")]
    of_pipeline = [key for key in keys if not key.startswith("evaluate.")]
    added = {"pipeline": of_pipeline, "evaluation": of_evaluation}
    return CIFAR10 | {section: (*CIFAR10[section], *more) for section, more in added.items()}


def run_parts(work: Work, names: list[str]) -> None:
    """Run the parts that have no line in results.jsonl yet, and write one for each.

    A part that fails has a line with the error and runs again in the next call. The parts that go on from it are left
    out. Raises SystemExit after the last part if any failed.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    path = work.folder / RESULTS
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    finished = {line["part"] for line in lines if "error" not in line}
    failed: set[str] = set()
    for name in names:
        if name in finished:
            continue
        if CONTINUES.get(name) in failed:
            print(f"{name}: left out, as {CONTINUES[name]} failed or was left out", file=sys.stderr)
            failed.add(name)
            continue
        print(f"{name}: {work.predicted_s.get(name, '?')} s predicted", file=sys.stderr)
        start_s = time.monotonic()
        try:
            figures = PARTS[name](work)
        except Exception:  # of whatever kind: it must not take the time of the other parts
            figures = {"error": traceback.format_exc()}
            failed.add(name)
        seconds = round(time.monotonic() - start_s, 1)
        line = {"part": name, "seconds": seconds, "predicted_s": work.predicted_s.get(name), **figures}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line), flush=True)
    if failed:
        sys.exit(f"failed or left out: {', '.join(name for name in names if name in failed)}; see {path}")


def run_tests(work: Work) -> dict[str, Any]:
    """Run the tests that need a GPU, for at most a minute; without one only list them."""
    report = work.folder.absolute() / "junit.xml"
    report.unlink(missing_ok=True)
    # The files alone that hold such tests, as the whole suite takes half a minute to import; by name, so that tests of
    # stages, which the other parts run too, come last. A file that cannot be imported, as a library is missing, must
    # not keep the others from running.
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu\n" in path.read_text()]
    options = ["--continue-on-collection-errors", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *(options if work.device == "cuda" else ["--co"])]
    was_stopped = False
    with subprocess.Popen([*command, *files], cwd=ROOT, stdout=sys.stderr) as process:
        try:
            with suppress(Exception):  # which the next part, that needs Ray, will tell
                _start_ray(work)
                for _ in run_tasks(_import_stages, [()] * num_cpus()):
                    pass
            process.wait(TESTS_LIMIT_S)
        except subprocess.TimeoutExpired:
            was_stopped = True
            process.send_signal(signal.SIGINT)  # pytest then reports the tests that have ended
            process.wait(30)
        finally:
            process.kill()
    if work.device == "cpu":
        return {"exit_code": process.returncode}
    (suite,) = ElementTree.parse(report).getroot()
    failures = {
        f"{case.get('classname')}::{case.get('name')}": "\n".join(outcome.text or "" for outcome in case)[-1500:]
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    }
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"exit_code": process.returncode, "was_stopped": was_stopped, **counts, "failed": failures}


def train_encoder(work: Work) -> dict[str, Any]:
    """Train the encoder on the pool alone, embed with it, and let the nearest neighbours vote on the class."""
    config, run_dir = _run_pipeline(work, "embed")
    history = PretrainResult.read(run_dir).history
    rates = [metrics["images_per_s"] for metrics in history[1:]]
    # In the folder where the evaluation looks for it, and then does not search again.
    folder = str(work.judged / "quality")
    _start_ray(work)  # a pipeline that was complete already has not
    vote = judge_embeddings(run_dir, read_labels(run_dir), config.seed, search_device(work.device), folder)
    return {
        "epochs": len(history),
        "images_per_s": float(np.median(rates)) if rates else None,
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "nearest_10_right": vote.accuracy,
    }


def make_clusters(work: Work) -> dict[str, Any]:
    """Find neighbours and cluster."""
    _, run_dir = _run_pipeline(work, "cluster")
    result = ClusterResult.read(run_dir)
    right = judge_clustering(run_dir, read_labels(run_dir)).accuracy
    return {"sizes": result.sizes, "pseudo_labels_right": right, "trust": dict(result.trust or {})}


def train_proxy(work: Work) -> dict[str, Any]:
    """Train the proxy, score and select."""
    _, run_dir = _run_pipeline(work, None)
    history = TrainResult.read(run_dir).history
    coresets = SelectResult.read(run_dir).coresets
    return {
        "images_per_s": float(np.median([metrics["images_per_s"] for metrics in history])),
        "hard_fractions": {name: coreset.hard_fraction for name, coreset in coresets.items()},
    }


def evaluate_pruned_90(work: Work) -> dict[str, Any]:
    """Train on 10% of the images by every method."""
    return _evaluate(work, 0.1, work.methods)


def evaluate_pruned_70(work: Work) -> dict[str, Any]:
    """Train on 30% of the images by the methods without a proxy of their own, and on all images as the ceiling."""
    return _evaluate(work, 0.3, ("full", *(name for name in work.methods if name != "aum_ccs")))


def measure_rates(work: Work) -> dict[str, Any]:
    """Measure rates, next to those of matrix products on the same device."""
    return measure(work.sizes, torch.device(work.device))


PARTS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "tests": run_tests,
    "encoder": train_encoder,
    "clusters": make_clusters,
    "proxy": train_proxy,
    "pruned_90": evaluate_pruned_90,
    "pruned_70": evaluate_pruned_70,
    "rates": measure_rates,
}
# The part that must have ended before; the others need none.
CONTINUES = {"clusters": "encoder", "proxy": "clusters", "pruned_90": "proxy", "pruned_70": "proxy"}


def _start_ray(work: Work) -> None:
    """Start the Ray of all parts, if there is a GPU."""
    if work.device == "cuda":
        connect(_config(work).ray_address)


def _import_stages() -> None:
    for stage in ("index", "copy", "neighbors", "select"):
        import_module(f"elfs_ray.stages.{stage}.run")


def _config(work: Work, until: str | None = None) -> Config:
    """Return the config of the pipeline up to a stage."""
    places = (f"pool.uri={work.pool}", "pool.label=label", f"run_dir={work.run_dir}")
    # Only faiss's inverted file searches on CPUs where there is a GPU.
    search = ["cluster.neighbor_search=ivf"] if search_device(work.device) != work.device else []
    return load_config(preset("cifar10"), [*search, *work.pipeline, *places, *([f"until={until}"] if until else [])])


def _run_pipeline(work: Work, until: str | None) -> tuple[Config, RunDir]:
    """Run the pipeline up to a stage; return its config and run directory."""
    config = _config(work, until)
    return config, runner.run(config)


def _evaluate(work: Work, budget: float, methods: tuple[str, ...]) -> dict[str, Any]:
    """Train from scratch on the selections of some methods; return the mean accuracies and their spreads, in %."""
    keys = [f"runs=[{work.run_dir}]", f"out={work.judged}", f"test_uri={work.test}"]
    keys += [f"methods=[{','.join(methods)}]", f"budgets=[{budget}]", f"num_seeds={NUM_SEEDS[budget]}"]
    accuracies = {}
    for line in evaluation.run(load([*keys, *work.evaluation])).lines:
        cell = line.cells.get(str(budget)) or line.cells[ALL]
        accuracies[line.name] = [round(100 * cell.mean, 2), round(100 * cell.spread, 2)]
    return {"accuracies": accuracies}


if __name__ == "__main__":
    sys.exit(main())
